import hashlib
import json
import math
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from latentkv.errors import TrainingError
from latentkv.models.loading import load_model
from latentkv.resumable import alone_in
from latentkv.text import load_tokenizer
from latentkv.train import TrainingPlan, TrainOptions, train_model
from latentkv.train.data import find_corpus
from latentkv.train.report import Reporter
from latentkv.train.trainer import Trainer

OPTIONS = TrainOptions(
    steps=6, seq_len=16, batch_tokens=64, micro_batch=2, warmup=2, optimizer="muon", log_every=1, eval_every=0
)


def quiet() -> Console:
    return Console(file=StringIO())


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self, folder, rep, _: run(self, folder, rep, lambda: self.step >= step))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_resumed_run_ends_with_the_same_bits(
    dtype: str, tiny_config: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, dtype=dtype)
    whole, parts = (TrainingPlan(text_folder, tmp_path / name, tiny_config) for name in ("whole", "parts"))
    assert train_model(whole, options, quiet())
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert not train_model(parts, options, quiet())
        assert not (parts.out / "model.safetensors").exists()
    assert train_model(parts, options, quiet())
    for name in ("weights", "optimizer"):
        expected, got = (
            load_file(p.out / "checkpoints" / "step-00000006" / f"{name}.safetensors") for p in (whole, parts)
        )
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[key], got[key]) for key in expected)
    log = [json.loads(line) for line in (parts.out / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log if "loss" in r] == [1, 2, 3, 4, 5, 6]


def test_loss_falls_and_the_folder_is_a_checkpoint(tiny_config: Path, text_folder: Path, tmp_path: Path) -> None:
    plan = TrainingPlan(text_folder, tmp_path / "out", tiny_config, exclude=("bird.txt",))
    assert train_model(plan, replace(OPTIONS, steps=40, lr=1e-2, eval_every=20), quiet())
    summary = json.loads((plan.out / "training.json").read_text())
    losses = [r["loss"] for r in summary["log"] if "loss" in r]
    assert losses[0] > 5.5
    assert losses[-1] < 2.5
    assert summary["data"]["documents"] == 2
    assert summary["bits_per_byte"]["held-out"] < 3
    assert (plan.out / "loss.png").stat().st_size > 5000
    model = load_model(plan.out)
    assert len(model.mtp) == 1
    assert load_tokenizer(plan.out).vocab_size <= model.config.vocab_size


def test_yarn_continues_a_checkpoint_at_a_longer_length(tiny_config: Path, text_folder: Path, tmp_path: Path) -> None:
    first = TrainingPlan(text_folder, tmp_path / "first", tiny_config)
    train_model(first, replace(OPTIONS, steps=1), quiet())
    second = TrainingPlan(text_folder, tmp_path / "second", init=first.out, rope_scaling="yarn:8")
    train_model(second, replace(OPTIONS, steps=1, seq_len=128, batch_tokens=256, lr=1e-6), quiet())
    model = load_model(second.out)
    assert (model.config.rope.kind, model.config.max_positions) == ("yarn", 512)
    before, after = load_model(first.out).state_dict(), model.state_dict()
    assert all(torch.allclose(before[n].float(), after[n].float(), atol=1e-2) for n in before)


def test_a_checkpoint_without_the_mtp_layers_that_its_config_counts_can_be_trained_on(
    tiny_config: Path, text_folder: Path, tmp_path: Path
) -> None:
    first = TrainingPlan(text_folder, tmp_path / "first", tiny_config)
    train_model(first, replace(OPTIONS, steps=1), quiet())
    weights = load_file(first.out / "model.safetensors")
    main = {name: tensor for name, tensor in weights.items() if not name.startswith("model.layers.2.")}
    assert len(main) < len(weights)
    save_file(main, first.out / "model.safetensors", metadata={"format": "pt"})
    second = TrainingPlan(text_folder, tmp_path / "second", init=first.out)
    assert train_model(second, replace(OPTIONS, steps=1), quiet())
    assert len(load_model(second.out).mtp) == 0


def test_other_mathematics_is_not_resumed(tiny_config: Path, text_folder: Path, tmp_path: Path) -> None:
    plan = TrainingPlan(text_folder, tmp_path / "out", tiny_config)
    train_model(plan, replace(OPTIONS, steps=1), quiet())
    with pytest.raises(TrainingError, match="seed"):
        train_model(plan, replace(OPTIONS, seed=1), quiet())
    (text_folder / "cat.txt").write_text("Another text. " * 300)
    with pytest.raises(TrainingError, match="other data"):
        train_model(plan, OPTIONS, quiet())


def test_a_run_of_an_earlier_version_is_known_by_the_fingerprints_that_it_wrote(
    tiny_config: Path, text_folder: Path, tmp_path: Path
) -> None:
    plan = TrainingPlan(text_folder, tmp_path / "out", tiny_config)
    train_model(plan, replace(OPTIONS, steps=1), quiet())
    tokenizer = b"".join((plan.out / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json"))
    texts = "".join(find_corpus(text_folder).training_texts())
    data = hashlib.sha256((hashlib.sha256(tokenizer).hexdigest() + texts).encode()).hexdigest()
    assert json.loads((plan.out / "data" / "tokens.bin.json").read_text())["sha256"] == data
    config = json.dumps(json.loads(tiny_config.read_text()), sort_keys=True)
    state = json.loads((plan.out / "checkpoints" / "step-00000001" / "state.json").read_text())
    assert state["identity"] == hashlib.sha256((data + config).encode()).hexdigest()


@pytest.mark.skipif(sys.platform == "win32", reason="folders are locked where POSIX is")
def test_a_folder_that_another_process_trains_in_is_refused_and_left_alone(
    tiny_config: Path, text_folder: Path, tmp_path: Path
) -> None:
    plan = TrainingPlan(text_folder, tmp_path / "out", tiny_config, restart=True)
    train_model(plan, replace(OPTIONS, steps=1), quiet())
    before = sorted(plan.out.rglob("*"))
    with alone_in(plan.out, TrainingError), pytest.raises(TrainingError, match="out is being written by another pro"):
        train_model(plan, OPTIONS, quiet())
    assert sorted(plan.out.rglob("*")) == before


def test_what_cannot_be_trained_on_is_refused(tiny_config: Path, text_folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    blank = tmp_path / "blank.txt"
    blank.touch()
    cat, other_cat = text_folder / "cat.txt", empty / "cat.text"
    other_cat.write_text("Another cat.")
    for plan, options, words in (
        (TrainingPlan(empty, tmp_path / "o", tiny_config), OPTIONS, "no .txt file"),
        (TrainingPlan(text_folder, tmp_path / "o", tiny_config, exclude=("x.txt",)), OPTIONS, "x.txt"),
        (TrainingPlan(text_folder, tmp_path / "o", tiny_config, eval_files=(blank,)), OPTIONS, "blank.txt"),
        (TrainingPlan(text_folder, tmp_path / "o", tiny_config, eval_files=(cat, other_cat)), OPTIONS, "name cat"),
        (TrainingPlan(text_folder, tmp_path / "o"), OPTIONS, "--init"),
        (TrainingPlan(text_folder, tmp_path / "o", tiny_config, rope_scaling="linear:2"), OPTIONS, "yarn:FACTOR"),
        (
            TrainingPlan(text_folder, tmp_path / "o", tiny_config),
            replace(OPTIONS, seq_len=128, batch_tokens=256),
            "max_position_embeddings 64",
        ),
    ):
        with pytest.raises(TrainingError, match=words):
            train_model(plan, options, quiet())


def test_a_diverging_run_stops_with_a_reason(tiny_config: Path, text_folder: Path, tmp_path: Path) -> None:
    plan = TrainingPlan(text_folder, tmp_path / "out", tiny_config)
    with pytest.raises(TrainingError, match="smaller --lr"):
        train_model(plan, replace(OPTIONS, steps=30, lr=1e30, warmup=0, optimizer="adamw"), quiet())


def test_a_log_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert [r["step"] for r in Reporter(tmp_path, quiet(), resume_step=2).records] == [1, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [({"steps": None}, "--steps or --time-limit"), ({"batch_tokens": 50}, "multiple"), ({"lr": 0.0}, "--lr")],
)
def test_options_are_checked(change: dict[str, object], words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        replace(OPTIONS, **change)


STATES: list[tuple[str, bytes | dict[str, object]]] = [
    ("state.json", b""),
    ("state.json", b"[1]"),
    ("state.json", b"[" * 100_000),
    ("state.json", {"step": "3"}),
    ("state.json", {"step": -1}),
    ("state.json", {"elapsed": None}),
    ("state.json", {"options": [1]}),
    ("state.json", {"unknown": 1}),
    ("weights.safetensors", b"cut short"),
    ("weights.safetensors", {}),
    ("weights.safetensors", {"model.norm.weight": torch.zeros(3)}),
    ("optimizer.safetensors", {"nobody:exp_avg": torch.zeros(3)}),
]


def test_a_damaged_checkpoint_is_one_sentence_that_names_it_and_the_remedy(
    tiny_config: Path, text_folder: Path, tmp_path: Path
) -> None:
    plan = TrainingPlan(text_folder, tmp_path / "out", tiny_config)
    train_model(plan, replace(OPTIONS, steps=1), quiet())
    newest = plan.out / "checkpoints" / "step-00000001"
    for name, damage in STATES:
        whole = (newest / name).read_bytes()
        if isinstance(damage, bytes):
            (newest / name).write_bytes(damage)
        elif name == "state.json":
            (newest / name).write_text(json.dumps(json.loads(whole) | damage))
        else:
            save_file(damage, newest / name)
        with pytest.raises(TrainingError, match=r"step-00000001.*: remove ") as refused:
            train_model(plan, OPTIONS, quiet())
        assert "\n" not in str(refused.value)
        (newest / name).write_bytes(whole)


def test_nothing_is_made_or_forgotten_where_the_run_cannot_begin(
    tiny_config: Path, text_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("kept")
    empty, out = tmp_path / "empty", tmp_path / "out"
    empty.mkdir()
    (out / "checkpoints").mkdir(parents=True)
    for plan, words in (
        (TrainingPlan(text_folder, tmp_path / "file", tiny_config), "is a file, not a folder"),
        (TrainingPlan(text_folder, tmp_path, init=tmp_path), "is the checkpoint of --init itself"),
        (TrainingPlan(empty, tmp_path / "new", tiny_config), "no .txt file"),
        (TrainingPlan(empty, out, tiny_config, restart=True), "no .txt file"),
        (TrainingPlan(text_folder, tmp_path / "new", tiny_config, eval_fraction=math.nan), "--eval-fraction must be"),
        (TrainingPlan(text_folder, tmp_path / "new", tiny_config, eval_bytes=0), "--eval-bytes must be"),
    ):
        with pytest.raises(TrainingError, match=words):
            train_model(plan, OPTIONS, quiet())
    assert (tmp_path / "file").read_text() == "kept" and not (tmp_path / "new").exists()
    assert (out / "checkpoints").is_dir()
