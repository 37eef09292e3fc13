"""A model whose layers differ: each has its own attention, feed-forward block and memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from latentkv.models.batch import Batch
from latentkv.models.config import GQAConfig, MLAConfig, ModelConfig
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.forms import Form
from latentkv.plan import count_parameters
from latentkv.state import PagedCache, bytes_per_token

CONFIG = {
    "model_type": "deepseek_v3",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
}
TOKENS = [5, 9, 33, 7, 50, 2, 41, 18, 3, 3, 3, 60, 8, 1]


def mixed() -> ModelConfig:
    """Latents of two ranks, then keys and values under a window of 3 tokens."""
    config = read_config(CONFIG)
    first, last = config.layers
    small, grouped = MLAConfig(12, 10, 8, 6, q_lora_rank=10), GQAConfig(2, 8)
    layers = (first, replace(last, attention=small), replace(first, attention=grouped, sliding_window=3))
    return replace(config, layers=layers)


@pytest.mark.parametrize("form", ["absorbed", "expanded", None])
def test_it_reads_through_the_cache_what_it_reads_at_once(form: Form | None) -> None:
    torch.manual_seed(0)
    decoder = Decoder(mixed()).eval().requires_grad_(False)
    expected = decoder.forward_train(torch.tensor([TOKENS]))[0]
    cache = PagedCache(decoder.config.specs("fp32"), 4, page_size=4)
    pages = cache.pool.allocate(4)[::-1]
    read: list[torch.Tensor] = []
    for begin, end in ((0, 9), (9, 10), (10, 14)):
        batch = Batch.build([TOKENS[begin:end]], [begin], [pages], page_size=4)
        read.append(decoder(batch, cache, form=form))
    torch.testing.assert_close(torch.cat(read), expected, atol=2e-5, rtol=2e-5)


def test_its_bytes_and_parameters_are_those_of_its_layers() -> None:
    config = mixed()
    specs = config.specs("bf16")
    assert [spec.tokens.token_bytes for spec in specs] == [2 * (16 + 8), 48, 2 * 2 * 2 * 8]
    assert bytes_per_token(specs) == PagedCache(specs, 1).bytes_per_token == 48 + 48 + 64
    assert count_parameters(config) == sum(p.numel() for p in Decoder(config).parameters())
