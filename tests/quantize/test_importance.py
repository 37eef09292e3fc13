"""What counts in a weight's error: mean squares of what it is given, and integers that are chosen by them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_checks import copied_tokenizer
from quantize_models import LONGCAT, save_random
from torch import Tensor
from torch.nn import functional

from latentkv.checkpoint import CheckpointReader
from latentkv.errors import CheckpointError, OpError, TokenizerError
from latentkv.llm_options import EMBEDDED_MODEL
from latentkv.models.loading import load_model
from latentkv.quantize import column_importance, quantize_checkpoint
from latentkv.text import load_tokenizer
from latentkv.weights.weight import quantize_weight

TEXT = "It was a dark night, and the whale swam on.\n" * 8


def as_importance(rows: Tensor) -> Tensor:
    squares = rows.float().square().mean(0)
    return squares / squares.mean() * 0.99 + 0.01


def test_it_is_the_mean_square_of_what_a_matrix_is_given() -> None:
    found = column_importance(EMBEDDED_MODEL, TEXT)
    decoder, ids = load_model(EMBEDDED_MODEL), load_tokenizer(EMBEDDED_MODEL).encode(TEXT)
    with torch.inference_mode():
        layer = decoder.model.layers[0]
        given = layer.input_layernorm(decoder.embed(torch.tensor([ids])))[0]
        latent = layer.self_attn.q_a_layernorm(layer.self_attn.q_a_proj(given))
    for name, rows in (("q_a_proj", given), ("kv_a_proj_with_mqa", given), ("q_b_proj", latent)):
        expected = as_importance(rows)
        assert torch.allclose(found[f"model.layers.0.self_attn.{name}.weight"], expected, rtol=1e-3), name
    config = decoder.config
    assert config.moe is not None and not any(name.startswith("mtp") or "embed" in name for name in found)
    experts = [name for name in found if "layers.3.mlp.experts." in name]
    assert 0 < len(experts) <= 3 * config.moe.num_experts


def test_an_expert_counts_what_is_routed_to_it() -> None:
    found, decoder = column_importance(EMBEDDED_MODEL, TEXT), load_model(EMBEDDED_MODEL)
    seen: list[tuple[Tensor, Tensor]] = []
    experts = decoder.model.layers[2].mlp.experts
    experts.register_forward_pre_hook(lambda _, given: seen.append((given[0], given[1])))
    with torch.inference_mode():
        decoder.forward_train(torch.tensor([load_tokenizer(EMBEDDED_MODEL).encode(TEXT)]))
    ((x, ids),) = seen
    for expert in range(decoder.config.moe.num_experts):
        rows = x[(ids == expert).any(1)]
        name = f"model.layers.2.mlp.experts.{expert}"
        if not len(rows):
            assert f"{name}.up_proj.weight" not in found
            continue
        gate, up = functional.linear(rows, experts.gate_up_proj[expert]).chunk(2, -1)
        assert torch.allclose(found[f"{name}.up_proj.weight"], as_importance(rows), rtol=1e-3)
        inside = as_importance(functional.silu(gate) * up)
        assert torch.allclose(found[f"{name}.down_proj.weight"], inside, rtol=2e-2, atol=1e-2)


def test_experts_at_the_end_of_a_shortcut_have_the_names_that_a_copy_looks_for(tmp_path: Path) -> None:
    words = load_tokenizer(EMBEDDED_MODEL).needed_size
    source = save_random(tmp_path / "source", **LONGCAT, vocab_size=words)
    found = column_importance(copied_tokenizer(EMBEDDED_MODEL, source), TEXT)
    experts = {name for name in found if ".experts." in name}
    assert experts and all(name.startswith("model.layers.1.mlp.experts.") for name in experts)
    assert {int(name.split(".")[5]) for name in experts} <= set(range(4))  # zero experts have no weights
    assert "model.layers.1.mlp.down_proj.weight" in found
    quantize_checkpoint(source, tmp_path / "out", "int4", importance=found)
    name = next(name for name in experts if "up_proj" in name)
    stored = name.replace("layers.1", "layers.0")
    expected = quantize_weight(CheckpointReader(source).read(stored), "int4", 64, found[name])
    copy = CheckpointReader(tmp_path / "out").quantized(stored)
    assert copy is not None and torch.equal(copy.codes, expected.codes)


def test_a_model_without_words_cannot_be_calibrated(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="has no tokenizer, which calibrating on a text needs"):
        column_importance(save_random(tmp_path / "source"), TEXT)


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("shape", [(24, 192), (3, 8, 192)])
def test_integers_err_less_where_it_counts(shape: tuple[int, ...], group: int | None) -> None:
    weight, importance = torch.randn(shape), torch.ones(*shape[:-2], shape[-1])
    importance[..., torch.randperm(192)[:20]] = 100.0
    plain, weighed = (quantize_weight(weight, "int4", group, each) for each in (None, importance))

    def error(found: Tensor) -> float:
        return float(((found - weight).square() * importance.unsqueeze(-2)).sum())

    assert error(weighed.dequantize()) < 0.97 * error(plain.dequantize())
    same = quantize_weight(weight, "int4", group, torch.ones(192))
    assert torch.equal(same.codes, plain.codes) and torch.equal(same.scales, plain.scales)


def test_each_stacked_matrix_has_its_own() -> None:
    weight, importance = torch.randn(3, 700, 1024), torch.rand(3, 1024)
    whole = quantize_weight(weight, "int4", 128, importance)
    for index in range(3):
        alone = quantize_weight(weight[index], "int4", 128, importance[index])
        assert torch.equal(whole.codes[index], alone.codes) and torch.equal(whole.scales[index], alone.scales)


def test_importance_of_another_width_is_refused() -> None:
    with pytest.raises(OpError, match=r"the importance of columns of \[8, 64\] is \[64\]"):
        quantize_weight(torch.randn(8, 64), "int4", None, torch.ones(8))


def test_a_copy_takes_each_weights_own_and_is_told_from_another(tmp_path: Path) -> None:
    source = save_random(tmp_path / "source")
    names = ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.experts.2.up_proj.weight")
    importance = {name: torch.rand(64) * 10 for name in names}
    quantize_checkpoint(source, tmp_path / "out", "int4", importance=importance)
    before, after = CheckpointReader(source), CheckpointReader(tmp_path / "out")
    for name in (*names, "model.layers.1.mlp.experts.1.up_proj.weight"):
        expected = quantize_weight(before.read(name), "int4", 64, importance.get(name))
        found = after.quantized(name)
        assert found is not None and found.group == 64 and torch.equal(found.codes, expected.codes), name
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        quantize_checkpoint(source, tmp_path / "out", "int4")


def test_an_expert_with_a_limit_counts_what_the_limit_leaves(tmp_path: Path) -> None:
    hybrid = {"model_type": "bailing_hybrid", "architectures": None, "layer_group_size": 2, "head_dim": 16}
    limits = {"expert_swiglu_limit_list": [0, 0.05]}
    words = load_tokenizer(EMBEDDED_MODEL).needed_size
    source = save_random(tmp_path / "source", torch.float32, **hybrid, **limits, vocab_size=words)
    found = column_importance(copied_tokenizer(EMBEDDED_MODEL, source), TEXT)
    decoder, seen = load_model(source), list[tuple[Tensor, Tensor]]()
    experts = decoder.model.layers[1].mlp.experts
    experts.register_forward_pre_hook(lambda _, given: seen.append((given[0], given[1])))
    with torch.inference_mode():
        decoder.forward_train(torch.tensor([load_tokenizer(source).encode(TEXT)]))
    ((x, ids),) = seen
    expert = int(ids[0, 0])
    gate, up = functional.linear(x[(ids == expert).any(1)], experts.gate_up_proj[expert]).chunk(2, -1)
    inside = as_importance(functional.silu(gate).clamp(max=0.05) * up.clamp(-0.05, 0.05))
    assert torch.allclose(found[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"], inside, rtol=1e-3)
