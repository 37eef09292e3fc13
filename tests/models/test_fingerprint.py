import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from latentkv.kernels import available_backends, use_backend
from latentkv.models import fingerprint
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.fingerprint import model_fingerprint
from latentkv.models.packing import Packing
from latentkv.weights.formats import INT4, INT8

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 128,
    "dtype": "float32",
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.1, 2.2, 2.3],
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
WEIGHTS = bytes(32)


def of(
    changes: dict[str, Any] | None = None,
    *,
    weights: bytes = WEIGHTS,
    max_context: int | None = None,
    dtype: torch.dtype = torch.float32,
    packing: Packing | None = None,
    int8_products: bool = False,
) -> bytes:
    decoder = Decoder(read_config(copy.deepcopy(CONFIG | (changes or {}))), max_context=max_context).to(dtype)
    return model_fingerprint(decoder, weights, packing=packing, int8_products=int8_products)


def test_the_same_model_has_the_same_fingerprint():
    assert of() == of()
    assert len(of()) == 32


@pytest.mark.parametrize(
    "change",
    [
        {"weights": b"1" * 32},
        {"dtype": torch.bfloat16},
        {"packing": Packing()},
        {"packing": Packing(compact=True)},
        {"packing": Packing(INT8)},
        {"packing": Packing(INT8, 64)},
        {"packing": Packing(INT4)},
        {"int8_products": True},
        {"changes": {"rope_theta": 500.0}},
        {"changes": {"rms_norm_eps": 1e-5}},
        {"changes": {"routed_scaling_factor": 2.0}},
        {"changes": {"norm_topk_prob": False}},
        {"changes": {"num_experts_per_tok": 1}},
        {"changes": {"rope_parameters": YARN}},
        {"changes": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}},
    ],
    ids=str,
)
def test_whatever_changes_the_numbers_changes_the_fingerprint(change: dict):
    assert of(**change) != of()
    assert of(**change) == of(**change)


@pytest.mark.parametrize(("rope", "differs"), [(LONGROPE, True), (YARN, False), (None, False)])
def test_the_longest_context_counts_where_the_frequencies_depend_on_it(rope: dict | None, differs: bool):
    changes = {"rope_parameters": rope} if rope else {}
    short, longer, longest = (of(changes, max_context=context) for context in (32, 64, 128))
    assert longer == longest
    assert (short != longer) == differs


def test_the_program_counts(monkeypatch: pytest.MonkeyPatch, tmp_path):
    before = of()
    if len(available_backends()) > 1:
        with use_backend("torch"):
            assert of() != before
    monkeypatch.setattr(fingerprint, "_PACKAGE", tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mla.py").write_text("def attend(): ...\n")
    edited = of()
    (tmp_path / "models" / "mla.py").write_text("def attend(): return 0\n")
    assert len({before, edited, of()}) == 3


def test_every_field_of_the_config_counts():
    config = read_config(copy.deepcopy(CONFIG))
    decoder = Decoder(config)
    before = model_fingerprint(decoder, WEIGHTS, packing=None, int8_products=False)
    rotated = replace(config.rope, interleaved=not config.rope.interleaved)
    for change in (
        {"embedding_multiplier": 2.0},
        {"layers": tuple(replace(layer, rope=rotated) for layer in config.layers)},
    ):
        decoder.config = replace(config, **change)
        assert model_fingerprint(decoder, WEIGHTS, packing=None, int8_products=False) != before
