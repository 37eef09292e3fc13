"""A healed model is nearer to its source, and is a checkpoint like any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from sources import some_tokens, write_source
from transformers import AutoModelForCausalLM

from latentkv.convert import HEALING_FILE, ConvertOptions, HealOptions, convert_checkpoint, heal_checkpoint
from latentkv.convert.quality import compare_models
from latentkv.errors import TrainingError
from latentkv.models.loading import load_model

TOKENS = some_tokens(16)
OPTIONS = HealOptions(steps=30, batch_size=4, lr=2e-3)


@pytest.fixture(params=["llama", "qwen2"])
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """(source, converted)."""
    source = write_source(request.param, tmp_path / "source")
    convert_checkpoint(source, tmp_path / "out", TOKENS, ConvertOptions(rank=16, rope_dim=8))
    return source, tmp_path / "out"


@pytest.mark.parametrize("train", ["all", "attention"])
def test_healing_brings_the_model_nearer_and_transformers_still_agrees(models: tuple[Path, Path], train: str) -> None:
    source, folder = models
    before = compare_models(source, folder, TOKENS)
    healing = heal_checkpoint(folder, source, TOKENS, HealOptions(steps=30, batch_size=4, lr=2e-3, train=train))
    after = compare_models(source, folder, TOKENS)
    assert after["divergence"] < 0.8 * before["divergence"]
    assert len(healing.losses) == 30 and healing.losses[-1] < healing.losses[0]
    assert json.loads((folder / HEALING_FILE).read_text())["train"] == train
    model = load_model(folder, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        ours = model.logits(model.forward_train(TOKENS))
        assert float((theirs(TOKENS).logits - ours).abs().max()) < 2e-5 * float(ours.abs().max())


def test_layers_can_be_matched_first_which_moves_attention_alone_and_nearer(
    models: tuple[Path, Path],
) -> None:
    source, folder = models
    before, far = load_model(folder, dtype=torch.float32).state_dict(), compare_models(source, folder, TOKENS)
    healing = heal_checkpoint(folder, source, TOKENS, HealOptions(steps=90, match_steps=90, batch_size=4, lr=2e-3))
    assert healing.losses[-1] < 0.8 * healing.losses[0] < 1
    after = load_model(folder, dtype=torch.float32).state_dict()
    assert all(".self_attn." in name for name in before if not torch.equal(before[name], after[name]))
    assert compare_models(source, folder, TOKENS)["divergence"] < far["divergence"]


def test_an_interrupted_healing_goes_on_and_ends_with_the_same_weights(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = models
    monkeypatch.setattr("latentkv.convert.heal._SAVE_SECONDS", 0)

    shutil.copytree(folder, tmp_path / "whole")
    whole = heal_checkpoint(tmp_path / "whole", source, TOKENS, OPTIONS)

    def killed(step: int, steps: int, loss: float) -> None:
        if step == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal_checkpoint(folder, source, TOKENS, OPTIONS, on_progress=killed)
    resumed = heal_checkpoint(folder, source, TOKENS, OPTIONS)
    assert resumed.losses == whole.losses
    expected, found = (load_model(path, dtype=torch.float32).state_dict() for path in (tmp_path / "whole", folder))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_only_attention_moves_when_only_attention_is_trained(models: tuple[Path, Path]) -> None:
    source, folder = models
    before = load_model(folder, dtype=torch.float32).state_dict()
    heal_checkpoint(folder, source, TOKENS, HealOptions(steps=5, batch_size=4, lr=2e-3, train="attention"))
    after = load_model(folder, dtype=torch.float32).state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".self_attn." in name for name in moved)
    assert not any("layernorm" in name for name in moved)


def test_what_cannot_be_healed_is_refused(models: tuple[Path, Path]) -> None:
    source, folder = models
    with pytest.raises(TrainingError, match="fewer than a batch"):
        heal_checkpoint(folder, source, TOKENS[:2], OPTIONS)
    with pytest.raises(TrainingError, match="Healing diverged"):
        heal_checkpoint(folder, source, TOKENS, HealOptions(steps=20, batch_size=4, lr=1e20))
