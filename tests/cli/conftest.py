"""One tiny checkpoint with a tokenizer, and the command line run in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from command_line import run_here
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.loading import save_pretrained
from latentkv.text.bpe_trainer import save_tokenizer, train_bpe

CONFIG = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "dtype": "float32",
}
TEXT = ["The whale swam on, and the harpooner watched it from the mast. Don't you see the whale?\n"] * 20


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 256 tokens' context. Do not change it: take `copied_model` for that."""
    folder = tmp_path_factory.mktemp("tiny-model")
    torch.manual_seed(0)
    decoder = Decoder(read_config(CONFIG))
    for tensor in [*decoder.parameters(), *decoder.buffers()]:
        tensor.data.normal_(std=0.2)
    save_pretrained(decoder, folder)
    save_tokenizer(train_bpe(TEXT, 300), folder)
    return folder


@pytest.fixture
def copied_model(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model to damage."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture
def latentkv() -> Callable[..., Result]:
    """Run the command line in this process: latentkv("plan", "deepseek-v3")."""
    return run_here


@pytest.fixture
def edit_config(copied_model: Path) -> Callable[..., Path]:
    """Change keys of the copied model's config.json."""

    def edit(**changes: object) -> Path:
        path = copied_model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return copied_model

    return edit
