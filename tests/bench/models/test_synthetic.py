from pathlib import Path

import pytest
import torch

from latentkv.bench.models.synthetic import SYNTHETIC, synthetic_config, write_synthetic
from latentkv.checkpoint.reader import CheckpointReader
from latentkv.errors import RequestError
from latentkv.llm import LLM
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.parameters import count_parameters
from latentkv.weights.formats import ROUNDED_TO

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "n_routed_experts": 8,
    "eos_token_id": 49,
    "bos_token_id": 48,
}


def parameters(shape: str) -> int:
    with torch.device("meta"):
        decoder = Decoder(read_config(synthetic_config(shape)))
    return sum(tensor.numel() for tensor in decoder.state_dict().values())


@pytest.mark.parametrize(
    ("shape", "billions"),
    [
        *(("v2-lite", 15.71), ("v2-lite-4", 1.97), ("v2-lite-8e", 3.11), ("youtu-llm-2b", 1.96)),
        *(("ling-3.0-tiny", 7.893), ("ling-3.0-tiny-8", 2.382)),
    ],
)
def test_shapes_have_as_many_parameters_as_published(shape: str, billions: float):
    assert parameters(shape) / 1e9 == pytest.approx(billions, abs=0.006)


@pytest.mark.parametrize("shape", SYNTHETIC)
def test_end_tokens_lie_inside_the_vocabulary(shape: str):
    config = synthetic_config(shape)
    ids = [config[key] for key in ("bos_token_id", "eos_token_id") if key in config]  # A.X-K2's are one
    assert ids
    assert [0, *ids, config["vocab_size"] - 1] == sorted([0, *ids, config["vocab_size"] - 1])


def test_an_unknown_shape_is_refused():
    with pytest.raises(RequestError, match="v2-lite-4"):
        synthetic_config("v9")


def test_a_checkpoint_of_random_weights_loads_and_runs(tmp_path: Path):
    count = write_synthetic({**synthetic_config("v2-lite"), **TINY}, tmp_path / "a")
    llm = LLM(tmp_path / "a", kv_cache_bytes=10**6)
    assert llm.decoder.dtype == torch.bfloat16
    assert count == count_parameters(llm.config)
    logits = llm.logits([1, 2, 3])
    assert logits.isfinite().all()
    assert logits.std() > 0
    assert llm.config.rope.kind == "yarn"


def test_weights_depend_on_the_seed_alone(tmp_path: Path):
    config = {**synthetic_config("v2-lite"), **TINY}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_synthetic(config, tmp_path / name, seed=seed)
    a, b, c = (LLM(tmp_path / name, kv_cache_bytes=10**6).logits([1, 2]) for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_weights_are_drawn_as_they_are_stored(tmp_path: Path, weights: str):
    config = {**synthetic_config("v2-lite"), **TINY, "hidden_size": 128, "moe_intermediate_size": 64}
    for name, asked in (("plain", None), ("quantised", ROUNDED_TO[weights])):
        write_synthetic(config, tmp_path / name, weights=asked)
    plain, quantised = (LLM(tmp_path / name, kv_cache_bytes=10**6) for name in ("plain", "quantised"))
    assert quantised.logits([1, 2, 3]).isfinite().all()
    size = {n: sum(f.stat().st_size for f in (tmp_path / n).glob("*.safetensors")) for n in ("plain", "quantised")}
    assert size["quantised"] < 0.9 * size["plain"]
    reader = CheckpointReader(tmp_path / "quantised")
    name = "model.layers.1.mlp.shared_experts.up_proj.weight"
    drawn = reader.quantized(name)
    assert drawn is not None
    assert drawn.dequantize().std() == pytest.approx(plain.config.initializer_range, rel=0.05)
    assert reader.quantized("model.layers.0.self_attn.kv_a_proj_with_mqa.weight") is None


@pytest.mark.parametrize("weights", [None, "int4"])
def test_a_hybrid_of_random_weights_loads_and_runs(tmp_path: Path, weights: str | None):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "head_dim": 32}
    shape = {"num_hidden_layers": 4, "num_experts": 16, "moe_shared_expert_intermediate_size": 32, "kv_lora_rank": 32}
    others = {
        "q_lora_rank": 32,
        "partial_rotary_factor": None,
        "num_attention_heads": 2,
        "vocab_size": 50,
        "eos_token_id": 49,
    }
    config = {**synthetic_config("ling-3.0-tiny"), **sizes, **shape, **others}
    write_synthetic(config, tmp_path, weights=None if weights is None else ROUNDED_TO[weights])
    llm = LLM(tmp_path, kv_cache_bytes=10**7, max_context=256)
    assert llm.logits([1, 2, 3]).isfinite().all()
