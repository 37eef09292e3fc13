"""A healed model is nearer to its source, and is a checkpoint like any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from sources import some_tokens, write_source
from transformers import AutoModelForCausalLM

from latentkv.convert import ConvertOptions, HealOptions, convert_checkpoint, heal_checkpoint, read_record
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


OF_ONE = pytest.mark.parametrize("models", ["llama"], indirect=True)
"""What such a test tells apart is not of the source."""


@pytest.mark.parametrize(("models", "train"), [("qwen2", "all"), ("llama", "attention")], indirect=["models"])
def test_healing_brings_the_model_nearer_and_transformers_still_agrees(models: tuple[Path, Path], train: str) -> None:
    source, folder = models
    before = compare_models(source, folder, TOKENS)
    healing = heal_checkpoint(folder, source, TOKENS, HealOptions(steps=30, batch_size=4, lr=2e-3, train=train))
    after = compare_models(source, folder, TOKENS)
    assert after["divergence"] < 0.8 * before["divergence"]
    assert len(healing.losses) == 30 and healing.losses[-1] < healing.losses[0]
    assert read_record(folder)["healings"][0]["train"] == train
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


@pytest.mark.parametrize("models", ["qwen2"], indirect=True)  # has all that llama has, and biases
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
    assert not (folder / ".healing").exists()
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


EVALUATED = HealOptions(steps=30, batch_size=4, lr=2e-3, eval_every=10)
HELD_OUT = some_tokens(8, 48)


@OF_ONE
def test_held_out_text_is_measured_before_every_so_often_and_after(models: tuple[Path, Path]) -> None:
    source, folder = models
    before = compare_models(source, folder, HELD_OUT)
    found = heal_checkpoint(folder, source, TOKENS, EVALUATED, held_out=HELD_OUT).evaluations
    assert [each["step"] for each in found] == [0, 10, 20, 30]
    assert [each["healing_tokens"] for each in found] == [0, 2560, 5120, 7680]
    assert found[0]["converted"] == pytest.approx(before["converted"], rel=1e-4)
    after = compare_models(source, folder, HELD_OUT)
    assert found[-1]["converted"] == pytest.approx(after["converted"], rel=1e-5)
    assert found[-1]["divergence"] < found[1]["divergence"] < found[0]["divergence"]


@OF_ONE
def test_without_eval_every_held_out_text_is_measured_before_and_after(models: tuple[Path, Path]) -> None:
    source, folder = models
    healing = heal_checkpoint(folder, source, TOKENS, HealOptions(steps=3, batch_size=4), held_out=HELD_OUT)
    assert [each["step"] for each in healing.evaluations] == [0, 3]


@OF_ONE
@pytest.mark.parametrize("killed_at", [10, 14, 30])
def test_the_evaluations_of_an_interrupted_healing_have_no_gap_and_none_twice(
    models: tuple[Path, Path], killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = models
    monkeypatch.setattr("latentkv.convert.heal._SAVE_SECONDS", 0)
    shutil.copytree(folder, tmp_path / "whole")
    whole = heal_checkpoint(tmp_path / "whole", source, TOKENS, EVALUATED, held_out=HELD_OUT)

    def killed(step: int, steps: int, loss: float) -> None:
        if step == killed_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal_checkpoint(folder, source, TOKENS, EVALUATED, held_out=HELD_OUT, on_progress=killed)
    resumed = heal_checkpoint(folder, source, TOKENS, EVALUATED, held_out=HELD_OUT)
    assert resumed.evaluations == whole.evaluations
    expected, found = (read_record(path)["healings"][0] for path in (tmp_path / "whole", folder))
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}


def test_what_cannot_be_healed_is_refused(models: tuple[Path, Path]) -> None:
    source, folder = models
    with pytest.raises(TrainingError, match="fewer than a batch"):
        heal_checkpoint(folder, source, TOKENS[:2], OPTIONS)
    with pytest.raises(TrainingError, match="Healing diverged"):
        heal_checkpoint(folder, source, TOKENS, HealOptions(steps=20, batch_size=4, lr=1e20))
    with pytest.raises(TrainingError, match="--eval-every=0 is not allowed"):
        HealOptions(eval_every=0)
