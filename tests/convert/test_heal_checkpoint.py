"""A healed model is nearer to its source, and is a checkpoint like any other."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sources import some_tokens
from transformers import AutoModelForCausalLM

from latentkv.convert import HealOptions, heal_checkpoint, read_record
from latentkv.convert.quality import compare_models
from latentkv.errors import LatentKVError, TrainingError
from latentkv.models.loading import load_model

pytestmark = pytest.mark.usefixtures("unpainted")

TOKENS = some_tokens(16)
OPTIONS = HealOptions(steps=8, batch_size=4, lr=2e-3)
EVALUATED = HealOptions(steps=12, batch_size=4, lr=2e-3, eval_every=4)
HELD_OUT = some_tokens(8, 48)


OF_ONE = pytest.mark.parametrize("models", ["llama"], indirect=True)
"""What such a test tells apart is not of the source."""


@pytest.mark.parametrize(("models", "train"), [("qwen2", "all"), ("llama", "attention")], indirect=["models"])
def test_healing_brings_the_model_nearer_and_transformers_still_agrees(models: tuple[Path, Path], train: str) -> None:
    source, folder = models
    before = compare_models(source, folder, TOKENS)
    options = HealOptions(steps=30, batch_size=4, lr=2e-3, train=train)
    healing = heal_checkpoint(folder, source, TOKENS, options, held_out=TOKENS)
    after = compare_models(source, folder, TOKENS)
    assert after["divergence"] < 0.8 * before["divergence"]
    assert len(healing.losses) == 30 and healing.losses[-1] < healing.losses[0]
    assert read_record(folder)["healings"][0]["train"] == train
    model = load_model(folder, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        ours = model.logits(model.forward_train(TOKENS))
        assert float((theirs(TOKENS).logits - ours).abs().max()) < 2e-5 * float(ours.abs().max())


@OF_ONE
def test_layers_can_be_matched_first_which_moves_attention_alone_and_nearer(
    models: tuple[Path, Path],
) -> None:
    source, folder = models
    before, far = load_model(folder, dtype=torch.float32).state_dict(), compare_models(source, folder, TOKENS)
    options = HealOptions(steps=60, match_steps=60, batch_size=4, lr=2e-3)
    healing = heal_checkpoint(folder, source, TOKENS, options, held_out=HELD_OUT)
    assert healing.losses[-1] < 0.8 * healing.losses[0] < 1
    after = load_model(folder, dtype=torch.float32).state_dict()
    assert all(".self_attn." in name for name in before if not torch.equal(before[name], after[name]))
    assert compare_models(source, folder, TOKENS)["divergence"] < far["divergence"]


@pytest.mark.parametrize("models", ["qwen2"], indirect=True)  # has all that llama has, and biases
def test_an_interrupted_healing_goes_on_and_ends_with_the_same_weights(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = models
    monkeypatch.setattr("latentkv.convert.heal_loop._SAVE_SECONDS", 0)

    shutil.copytree(folder, tmp_path / "whole")
    whole = heal_checkpoint(tmp_path / "whole", source, TOKENS, OPTIONS)

    def killed(stage: str, step: int, steps: int) -> None:
        if stage.startswith("train") and step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal_checkpoint(folder, source, TOKENS, OPTIONS, on_progress=killed)
    resumed = heal_checkpoint(folder, source, TOKENS, OPTIONS)
    assert resumed.losses == whole.losses
    assert not (folder / ".healing").exists()
    expected, found = (load_model(path, dtype=torch.float32).state_dict() for path in (tmp_path / "whole", folder))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@OF_ONE
@pytest.mark.parametrize("train", ["all", "attention", "lora"])
def test_in_bf16_healing_brings_the_model_as_much_nearer_and_goes_on_exactly(
    models: tuple[Path, Path], train: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = models
    monkeypatch.setattr("latentkv.convert.heal_loop._SAVE_SECONDS", 0)
    options = HealOptions(steps=20, batch_size=4, lr=1e-2 if train == "lora" else 2e-3, train=train)
    nearer: list[float] = []
    for name, dtype in (("exact", "fp32"), ("whole", "bf16")):
        shutil.copytree(folder, tmp_path / name)
        done = heal_checkpoint(tmp_path / name, source, TOKENS, replace(options, dtype=dtype), held_out=TOKENS)
        nearer.append(done.evaluations[-1]["divergence"] / done.evaluations[0]["divergence"])
    assert nearer[1] < 0.9 and nearer[1] == pytest.approx(nearer[0], abs=0.03)

    def killed(stage: str, step: int, steps: int) -> None:
        if stage.startswith("train") and step == 9:
            raise KeyboardInterrupt

    before = load_model(folder, dtype=torch.float32).state_dict()
    with pytest.raises(KeyboardInterrupt):
        heal_checkpoint(folder, source, TOKENS, replace(options, dtype="bf16"), held_out=TOKENS, on_progress=killed)
    heal_checkpoint(folder, source, TOKENS, replace(options, dtype="bf16"), held_out=TOKENS)
    expected, found = (load_model(path, dtype=torch.float32).state_dict() for path in (tmp_path / "whole", folder))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    moved = {name for name in before if not torch.equal(before[name], found[name])}
    assert moved and (train == "all" or all(".self_attn." in name for name in moved))


@OF_ONE
def test_only_attention_moves_when_only_attention_is_trained(models: tuple[Path, Path]) -> None:
    source, folder = models
    before = load_model(folder, dtype=torch.float32).state_dict()
    heal_checkpoint(folder, source, TOKENS, HealOptions(steps=5, batch_size=4, lr=2e-3, train="attention"))
    after = load_model(folder, dtype=torch.float32).state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".self_attn." in name for name in moved)
    assert not any("layernorm" in name for name in moved)


def test_held_out_text_is_measured_before_every_so_often_and_after(models: tuple[Path, Path]) -> None:
    source, folder = models
    before = compare_models(source, folder, HELD_OUT)
    found = heal_checkpoint(folder, source, TOKENS, EVALUATED, held_out=HELD_OUT).evaluations
    assert [each["step"] for each in found] == [0, 4, 8, 12]
    assert [each["healing_tokens"] for each in found] == [0, 1024, 2048, 3072]
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
@pytest.mark.parametrize("killed_at", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_the_evaluations_of_an_interrupted_healing_have_no_gap_and_none_twice(
    models: tuple[Path, Path], killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = models
    monkeypatch.setattr("latentkv.convert.heal_loop._SAVE_SECONDS", 0)
    shutil.copytree(folder, tmp_path / "whole")
    whole = heal_checkpoint(tmp_path / "whole", source, TOKENS, EVALUATED, held_out=HELD_OUT)

    def killed(stage: str, step: int, steps: int) -> None:
        if stage.startswith("train") and step == killed_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal_checkpoint(folder, source, TOKENS, EVALUATED, held_out=HELD_OUT, on_progress=killed)
    resumed = heal_checkpoint(folder, source, TOKENS, EVALUATED, held_out=HELD_OUT)
    assert resumed.evaluations == whole.evaluations
    expected, found = (read_record(path)["healings"][0] for path in (tmp_path / "whole", folder))
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("models", ["llama"], indirect=True)
@pytest.mark.parametrize("given", [True, False])
def test_a_healing_that_makes_the_model_worse_leaves_it_as_it_was(models: tuple[Path, Path], given: bool) -> None:
    source, folder = models
    before = contents(folder)
    held_out = HELD_OUT if given else None
    with pytest.raises(TrainingError, match=r"would make .* worse .*so it stays as it was: give a lower --lr than 5,"):
        heal_checkpoint(folder, source, TOKENS, HealOptions(steps=2, batch_size=4, lr=5.0), held_out=held_out)
    assert contents(folder) == before
    heal_checkpoint(folder, source, TOKENS, HealOptions(steps=4, batch_size=4, lr=2e-3), held_out=held_out)
    assert contents(folder)["model.safetensors"] and read_record(folder)["healings"]


@pytest.mark.parametrize("models", ["llama"], indirect=True)
@pytest.mark.parametrize("lr", [1e37, 1e300])
def test_weights_that_the_last_step_made_infinite_are_never_stored(models: tuple[Path, Path], lr: float) -> None:
    source, folder = models
    before = contents(folder)
    with pytest.raises(TrainingError, match=r"stay.? as it was"):
        heal_checkpoint(folder, source, TOKENS, HealOptions(steps=1, batch_size=4, lr=lr), held_out=HELD_OUT)
    assert contents(folder) == before


@pytest.mark.parametrize("models", ["llama"], indirect=True)
def test_after_a_healing_that_diverged_another_rate_can_be_tried(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = models
    before = contents(folder)
    monkeypatch.setattr("latentkv.convert.heal_loop._SAVE_SECONDS", 0)
    with pytest.raises(TrainingError, match="Healing diverged at step"):
        heal_checkpoint(folder, source, TOKENS, HealOptions(steps=20, batch_size=4, lr=1e20))
    assert contents(folder) == before


@pytest.mark.parametrize("models", ["llama"], indirect=True)
def test_what_does_not_belong_together_is_refused_before_any_weight_is_read(models: tuple[Path, Path]) -> None:
    source, folder = models
    for weights in (*source.glob("*.safetensors"), *folder.glob("*.safetensors")):
        weights.unlink()
    options = HealOptions(steps=2, match_steps=1)
    (folder.parent / "again").symlink_to(folder)
    for target, teacher, words in (
        (folder, folder, "is the teacher itself"),
        (folder, folder.parent / "again", "is the teacher itself"),
        (source, folder, "has no latent attention"),
        (folder / "config.json", source, "is no folder"),
        (folder.parent / "nothing", source, "is no folder"),
    ):
        with pytest.raises(TrainingError, match=words):
            heal_checkpoint(target, teacher, TOKENS, options)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(TrainingError, match=r"is not the source of .* num_layers is 2, not 1"):
        heal_checkpoint(folder, source, TOKENS, options)
    (folder / "report.json").write_text('{"healings": 3}')
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(LatentKVError, match=r"report.json is damaged .*: remove it"):
        heal_checkpoint(folder, source, TOKENS, options)


def interrupted_after(steps: int) -> Callable[[str, int, int], None]:
    def on_progress(stage: str, done: int, total: int) -> None:
        if stage.startswith("train") and done == steps:
            raise KeyboardInterrupt

    return on_progress


DAMAGES = [
    ("state.json", b""),
    ("state.json", b"[]"),
    ("state.json", b'{"fingerprint": 3}'),
    ("state.json", b"[" * 100_000),
    ("state.json", {"losses": "many"}),
    ("state.json", {"evaluations": [{}]}),
    ("state.json", {"number": None}),
    ("weights.safetensors", b"short"),
    ("weights.safetensors", {}),
    ("optimizer.safetensors", {"nobody:exp_avg": torch.zeros(1)}),
    ("optimizer.safetensors", {"model.norm.weight:exp_avg": torch.zeros(3)}),
]


@OF_ONE
def test_a_healing_of_an_earlier_version_is_known_by_the_fingerprint_that_it_wrote(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = models
    monkeypatch.setattr("latentkv.convert.heal_loop._SAVE_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        heal_checkpoint(folder, source, TOKENS, OPTIONS, held_out=HELD_OUT, on_progress=interrupted_after(3))
    newest = sorted((folder / ".healing").iterdir())[-1]
    texts = TOKENS.numpy().tobytes() + HELD_OUT.numpy().tobytes()
    expected = hashlib.sha256(json.dumps(asdict(OPTIONS), sort_keys=True).encode() + texts).hexdigest()
    assert json.loads((newest / "state.json").read_text())["fingerprint"] == expected


@pytest.mark.parametrize("models", ["llama"], indirect=True)
def test_a_damaged_resume_state_is_one_sentence_that_names_it_and_the_remedy(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = models
    monkeypatch.setattr("latentkv.convert.heal_loop._SAVE_SECONDS", 0)

    with pytest.raises(KeyboardInterrupt):
        heal_checkpoint(folder, source, TOKENS, OPTIONS, on_progress=interrupted_after(3))
    newest = sorted((folder / ".healing").iterdir())[-1]
    whole = contents(newest)
    for name, damage in DAMAGES:
        if isinstance(damage, bytes):
            (newest / name).write_bytes(damage)
        elif name == "state.json":
            (newest / name).write_text(json.dumps(json.loads(whole[name]) | damage))
        else:
            save_file(damage, newest / name)
        with pytest.raises(TrainingError, match=r"^\S*step-0000000\d\S* .*: .*remove \S+.*\.$|remove"):
            heal_checkpoint(folder, source, TOKENS, OPTIONS)
        (newest / name).write_bytes(whole[name])
    assert len(heal_checkpoint(folder, source, TOKENS, OPTIONS).losses) == OPTIONS.steps


@pytest.mark.parametrize("models", ["llama"], indirect=True)
def test_progress_names_its_stage_and_counts(models: tuple[Path, Path]) -> None:
    source, folder = models
    seen: list[tuple[str, int, int]] = []
    heal_checkpoint(
        folder,
        source,
        TOKENS,
        HealOptions(steps=3, match_steps=1, batch_size=4),
        held_out=HELD_OUT,
        on_progress=lambda stage, done, total: seen.append((stage.split(",")[0], done, total)),
    )
    before, after = ([(f"measure {when}", count, 8) for count in (4, 8)] for when in ("before", "after"))
    assert seen == [*before, ("match layers", 1, 1), ("train", 2, 3), ("train", 3, 3), *after]


def test_what_cannot_be_healed_is_refused(models: tuple[Path, Path]) -> None:
    source, folder = models
    with pytest.raises(TrainingError, match="fewer than a batch"):
        heal_checkpoint(folder, source, TOKENS[:2], OPTIONS)
    for name, asked in (("train", "norms"), ("dtype", "int8")):
        with pytest.raises(TrainingError, match=f"--{name}={asked} is not allowed: choose "):
            HealOptions(**{name: asked})
    with pytest.raises(TrainingError, match="--hidden-weight must be"):
        HealOptions(hidden_weight=-1)
    with pytest.raises(TrainingError, match="--eval-every must be a whole number from 1"):
        HealOptions(eval_every=0)
