"""Models' decode speed: in turn, at one depth that all take, and said under which conditions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from latentkv.bench.models import decode_speed
from latentkv.bench.models.decode_speed import measure_decode
from latentkv.bench.timing import Contender, Timing
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.loading import save_pretrained

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "dtype": "float32",
}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """Of one layer and of 24."""
    torch.manual_seed(0)
    for name, layers, context in (("small", 1, 128), ("large", 24, 96)):
        config = CONFIG | {"num_hidden_layers": layers, "max_position_embeddings": context}
        save_pretrained(Decoder(read_config(config)), tmp_path / name)
    return {name: tmp_path / name for name in ("small", "large")}


def test_tokens_a_second_are_those_of_each_models_own_rounds_and_the_conditions_are_said(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: dict[str, int] = {}

    def timed(contenders: Mapping[str, Contender], *, repeats: int) -> dict[str, Timing]:
        for name, contender in contenders.items():
            contender.step()
            lengths[name] = repeats
        return {"large": Timing((2.0, 4.0, 6.0)), "small": Timing((0.5,))}

    monkeypatch.setattr(decode_speed, "time_interleaved", timed)
    speed = measure_decode(models, torch.float32, new_tokens=4, repeats=5)
    assert speed.tokens_per_second == {"small": 8.0, "large": 1.0}
    assert speed.spread == {"small": 0.0, "large": 0.5}
    assert lengths == {"small": 5, "large": 5}
    assert (speed.depth, speed.new_tokens, speed.repeats) == (92, 4, 5)  # what the shorter context leaves
    assert (speed.dtype, speed.threads) == ("fp32", torch.get_num_threads())


def test_depth_and_dtype_are_as_asked(models: dict[str, Path]) -> None:
    speed = measure_decode(models, torch.bfloat16, depth=32, new_tokens=2, repeats=1)
    assert (speed.depth, speed.dtype) == (32, "bf16")
