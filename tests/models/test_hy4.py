"""Hy4: which pairs it rotates, what stays float32, and what its keys mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families_for_tests import CASES, VOCAB, Case, save_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from latentkv.errors import ConfigError
from latentkv.models.config import IndependentHyperConnectionConfig, MLAConfig
from latentkv.models.config_reader import read_config
from latentkv.models.loading import load_model, save_pretrained
from latentkv.models.packing import Packing
from latentkv.ops import SwigluLimit

CASE = next(case for case in CASES if case.name == "hy4")
IDS = torch.randint(3, VOCAB, (1, 41), generator=torch.Generator().manual_seed(1))
EXACT = ("sinks", "k_norm.weight", "k_norm.bias", "weights_proj.weight", "_hc.fn", "hc_head.scale", "lm_head.weight")


def save(folder: Path, case: Case = CASE) -> torch.Tensor:
    """A checkpoint that transformers wrote, and its logits of IDS."""
    model = save_checkpoint(case, folder)
    with torch.inference_mode():
        return model(IDS).logits


def logits(folder: Path) -> torch.Tensor:
    decoder = load_model(folder)
    with torch.inference_mode():
        return decoder.logits(decoder.forward_train(IDS))


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def test_its_defaults_are_those_of_transformers_but_for_the_pairs_that_are_rotated() -> None:
    config = read_config({"model_type": "hy_v4"})
    first = config.layers[0]
    assert isinstance(first.attention, MLAConfig) and first.rope is not None and first.indexer is not None
    assert first.attention.sinks and first.attention.output_gate == "element"
    assert config.hyper_connections == IndependentHyperConnectionConfig(4, 1e-6, 2.0)
    assert config.exact_head and config.num_mtp_layers == 0 and config.swiglu_limit is None
    moe = config.layers[1].moe
    assert first.moe is None and moe is not None and moe.shared_swiglu_limit is None
    assert moe.swiglu_limit == SwigluLimit(10.0, bounds_gate=True)
    assert [i for i, layer in enumerate(config.layers) if layer.own_indexer] == [0, *range(1, 34, 4)]
    assert first.rope.interleaved and first.indexer.interleaved and first.indexer.rotates_last
    assert first.indexer.norm_eps == 1e-5 and first.indexer.exact_norm


@pytest.mark.parametrize(
    ("keys", "pairs"),
    [
        ({"rope_interleave": False}, (False, False)),
        ({"indexer_rope_interleave": False}, (True, False)),
        ({"rope_interleave": False, "indexer_rope_interleave": True}, (False, True)),
    ],
)
def test_keys_say_which_pairs_are_rotated(keys: dict[str, bool], pairs: tuple[bool, bool]) -> None:
    layer = read_config({"model_type": "hy_v4", **keys}).layers[0]
    assert layer.rope is not None and layer.indexer is not None
    assert (layer.rope.interleaved, layer.indexer.interleaved) == pairs


def test_published_weights_rotate_the_pairs_that_those_of_transformers_have_as_halves(tmp_path: Path) -> None:
    expected = save(tmp_path, replace(CASE, saved={}))
    sizes, tensors = CASE.config, load_file(tmp_path / "model.safetensors")
    rope = sizes["qk_rope_head_dim"]
    pairs = torch.arange(rope).view(2, -1).T.flatten()  # where each number of the pairs lies among the halves
    for name, weight in tensors.items():
        heads = {"q_b_proj.weight": sizes["num_attention_heads"], "wq_b.weight": sizes["index_n_heads"]}
        if name.endswith((*heads, "kv_a_proj_with_mqa.weight", "wk.weight", "k_norm.weight", "k_norm.bias")):
            count = next((n for end, n in heads.items() if name.endswith(end)), 1)
            rows = weight.view(count, -1, *weight.shape[1:]).clone()
            rows[:, -rope:] = rows[:, -rope:][:, pairs]
            tensors[name] = rows.view_as(weight)
    assert error(logits(tmp_path), expected) > 1e-2
    save_file(tensors, tmp_path / "model.safetensors")
    assert error(logits(tmp_path), expected) <= 1e-4


def test_names_of_published_files_are_read_and_what_predicts_further_tokens_is_left_out(tmp_path: Path) -> None:
    expected = save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    published = {
        name.replace("linear_gate", "gate_proj") if ".mlp." in name else name: t for name, t in tensors.items()
    }
    assert published.keys() != tensors.keys()
    published["model.mtp_layers.0.eh_proj.weight"] = torch.zeros(2, 2)
    save_file(published, tmp_path / "model.safetensors")
    assert error(logits(tmp_path), expected) <= 1e-4


def test_a_saved_checkpoint_gives_the_same_logits_in_transformers(tmp_path: Path) -> None:
    save(tmp_path / "source")
    decoder = load_model(tmp_path / "source")
    save_pretrained(decoder, tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        expected = theirs.eval()(IDS).logits
    assert error(logits(tmp_path / "saved"), expected) <= 1e-4


def test_what_is_trained_in_float32_stays_so_in_memory_and_in_files(tmp_path: Path) -> None:
    save(tmp_path / "source")
    exact = load_model(tmp_path / "source")
    for packing in (None, Packing()):
        decoder = load_model(tmp_path / "source", dtype=torch.bfloat16, packing=packing)
        state = decoder.state_dict()
        names = [name for name in state if name.endswith(EXACT)]
        assert {end for end in EXACT for name in names if name.endswith(end)} == set(EXACT)
        assert all(torch.equal(state[name], exact.state_dict()[name]) for name in names)
        with torch.inference_mode():
            got = decoder.logits(decoder.forward_train(IDS))
        assert got.dtype == torch.float32 and got.isfinite().all()
    save_pretrained(exact, tmp_path / "saved", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    kept = [name for name, tensor in stored.items() if tensor.dtype == torch.float32]
    for end in ("learnable_sink_param", "k_norm.bias", "hc_attn_layer.hc_fn", "hc_head.hc_head_base", "lm_head.weight"):
        assert any(name.endswith(end) for name in kept), end
    assert not any("q_b_proj" in name or "layernorm" in name for name in kept)


@pytest.mark.parametrize(
    ("model_type", "change", "named"),
    [
        ("hy_v4", {"hc_mult": 17}, "hc_mult"),
        ("hy_v4", {"swiglu_limit": -1.0}, "swiglu_limit"),
        ("hy_v4", {"index_head_dim": 32}, "index_head_dim=32"),
        ("deepseek_v3", {"hc_mult": 4}, "hc_mult=4 is not supported"),
        ("deepseek_v3", {"swiglu_limit": 7.0}, "swiglu_limit=7.0 is not supported"),
    ],
)
def test_what_cannot_be_is_refused_by_name(model_type: str, change: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_config({"model_type": model_type, **change})
