"""Low-rank updates: nothing at the start, the only thing that is trained, and the same model once merged."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sources import some_tokens

from latentkv.convert import HealOptions, heal_checkpoint, read_record
from latentkv.convert.lora import PROJECTIONS, low_rank_updates
from latentkv.convert.quality import compare_models
from latentkv.errors import TrainingError
from latentkv.models.decoder import Decoder
from latentkv.models.loading import load_model

pytestmark = pytest.mark.usefixtures("unpainted")

TOKENS = some_tokens(16)
LORA = HealOptions(steps=30, batch_size=4, lr=1e-2, train="lora", lora_rank=4, lora_alpha=4)
SHORT = replace(LORA, steps=8)


@torch.no_grad()
def logits(model: Decoder) -> torch.Tensor:
    return model.logits(model.forward_train(TOKENS[:2]))


def draw_updates(model: Decoder) -> None:
    """Give every B a value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def test_at_the_start_the_model_is_what_it_was(models: tuple[Path, Path]) -> None:
    model = load_model(models[1], dtype=torch.float32)
    before = logits(model)
    with low_rank_updates(model, rank=4, alpha=8, seed=0):
        assert torch.equal(logits(model), before)


def test_only_the_factors_of_attentions_projections_get_gradients(models: tuple[Path, Path]) -> None:
    model = load_model(models[1], dtype=torch.float32)
    with low_rank_updates(model, rank=4, alpha=8, seed=0):
        draw_updates(model)
        model.logits(model.forward_train(TOKENS[:2])).square().mean().backward()
        moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        factors = {name for name, _ in model.named_parameters() if name.endswith(("lora_a", "lora_b"))}
    assert moved == factors
    adapted = {name.rsplit(".", 2)[-2] for name in factors}
    assert adapted == {name for name in PROJECTIONS if hasattr(model.model.layers[0].self_attn, name)}
    assert {"kv_a_proj_with_mqa", "kv_b_proj", "o_proj"} < adapted and len(adapted) == 4


def test_the_merged_model_gives_the_logits_of_the_adapted_one_and_has_its_old_names(models: tuple[Path, Path]) -> None:
    model = load_model(models[1], dtype=torch.float32)
    names, before = set(model.state_dict()), logits(model)
    with low_rank_updates(model, rank=4, alpha=8, seed=0):
        draw_updates(model)
        adapted = logits(model)
    assert set(model.state_dict()) == names
    scale = float(adapted.abs().max())
    assert float((adapted - before).abs().max()) > 1e-2 * scale
    assert float((logits(model) - adapted).abs().max()) < 1e-5 * scale


def test_after_an_error_the_model_is_what_it_was(models: tuple[Path, Path]) -> None:
    model = load_model(models[1], dtype=torch.float32)
    before = logits(model)
    with pytest.raises(KeyboardInterrupt), low_rank_updates(model, rank=4, alpha=8, seed=0):
        draw_updates(model)
        raise KeyboardInterrupt
    assert torch.equal(logits(model), before)


def test_healing_by_low_rank_updates_brings_the_model_nearer_and_moves_attentions_matrices_alone(
    models: tuple[Path, Path],
) -> None:
    source, folder = models
    before, far = load_model(folder, dtype=torch.float32).state_dict(), compare_models(source, folder, TOKENS)
    heal_checkpoint(folder, source, TOKENS, LORA, held_out=TOKENS)
    assert compare_models(source, folder, TOKENS)["divergence"] < 0.9 * far["divergence"]
    after = load_model(folder, dtype=torch.float32).state_dict()
    assert set(after) == set(before)
    moved = [name for name in before if not torch.allclose(before[name], after[name], rtol=1e-5, atol=0)]
    assert moved and all(name.removesuffix(".weight").endswith(PROJECTIONS) for name in moved)
    for name in moved:  # by matrices of rank 4
        spectrum = torch.linalg.svdvals((after[name] - before[name]).double())
        assert float(spectrum[4:].max()) < 1e-4 * float(spectrum[0])
    assert read_record(folder)["healings"][0]["lora_rank"] == 4


@pytest.mark.parametrize(
    ("models", "killed_at"), [pytest.param("llama", 3, marks=pytest.mark.slow), ("qwen2", 8)], indirect=["models"]
)
def test_an_interrupted_healing_by_low_rank_updates_ends_with_the_same_weights(
    models: tuple[Path, Path], killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = models
    monkeypatch.setattr("latentkv.convert.heal_loop._SAVE_SECONDS", 0)
    shutil.copytree(folder, tmp_path / "whole")
    whole = heal_checkpoint(tmp_path / "whole", source, TOKENS, SHORT, held_out=TOKENS)

    def killed(stage: str, step: int, steps: int) -> None:
        if stage.startswith("train") and step == killed_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal_checkpoint(folder, source, TOKENS, SHORT, held_out=TOKENS, on_progress=killed)
    assert heal_checkpoint(folder, source, TOKENS, SHORT, held_out=TOKENS).losses == whole.losses
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("models", ["qwen2"], indirect=True)  # what is told apart is not of the source
def test_a_healing_that_is_killed_once_its_weights_are_written_does_not_add_its_updates_twice(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = models
    shutil.copytree(folder, tmp_path / "whole")
    heal_checkpoint(tmp_path / "whole", source, TOKENS, SHORT, held_out=TOKENS)

    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("latentkv.convert.heal.add_healing", killed)
        heal_checkpoint(folder, source, TOKENS, SHORT, held_out=TOKENS)
    heal_checkpoint(folder, source, TOKENS, SHORT, held_out=TOKENS)
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert len(read_record(folder)["healings"]) == 1


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(TrainingError, match="--lora-rank must be a whole number from 1"):
        HealOptions(train="lora", lora_rank=0)
