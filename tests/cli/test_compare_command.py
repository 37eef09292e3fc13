"""`latentkv compare`: fair runs, resumed runs, what is printed and kept, and wrong usage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from latentkv.compare import PLOT_FILE, REPORT_FILE, TABLE_FILE
from latentkv.train.trainer import Trainer
from latentkv.train.windows import Windows

pytestmark = pytest.mark.usefixtures("unpainted")  # but for one test

PAINT = Figure.savefig
SMALL = {
    "--arms": "mha,mla-12",
    "--seeds": 2,
    "--steps": 6,
    "--lrs": "1e-4,1e-2",
    "--hidden": 32,
    "--layers": 1,
    "--heads": 4,
    "--vocab": 512,
    "--seq-len": 16,
    "--batch-tokens": 64,
    "--eval-bytes": 2000,
    "--threads": 1,
}
SWEEP_STEPS, RUNS = 2, 2 * 2 + 2 * 2


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for animal in ("cat", "dog", "bird"):
        lines = [f"The {animal} sat on mat {i % 7} and looked at the {animal}.\n" for i in range(120)]
        (folder / f"{animal}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def asked(texts: Path, tmp_path: Path):
    """The command for a folder, options replaced."""

    def command(out: str, *flags: str, **changes: object) -> list[object]:
        options = SMALL | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
        words = [word for pair in options.items() for word in pair]
        return ["compare", "--data", texts, "--eval-file", texts / "dog.txt", "--out", tmp_path / out, *words, *flags]

    return command


def findings(out: Path) -> list[dict[str, Any]]:
    """What is found of each arm, without how fast it was."""
    return [arm | {"decode": None} for arm in json.loads((out / REPORT_FILE).read_text())["arms"]]


def test_arms_are_tuned_trained_and_reported(latentkv, asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", PAINT)
    result = latentkv(*asked("out"))
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "out"
    report = json.loads((out / REPORT_FILE).read_text())
    assert report["finished"] == report["total"] == RUNS
    assert (report["sweep_seed"], report["sweep_steps"]) == (0, SWEEP_STEPS)
    assert report["held_out"]["names"] == ["dog"]
    assert report["training"]["documents"] == 2
    mha, mla = report["arms"]
    assert (mha["cached_numbers"], mha["cached_bytes"]) == (64, 128)
    assert (mla["cached_numbers"], mla["cached_bytes"]) == (16, 32)
    assert mla["parameters"] == pytest.approx(mha["parameters"], rel=0.01)
    for arm in (mha, mla):
        assert arm["sweep"].keys() == {"0.0001", "0.01"}
        assert arm["rate"] == float(min(arm["sweep"], key=arm["sweep"].get))
        assert arm["rate_at_edge"]
        assert arm["losses"].keys() == {"1", "2"}
        assert arm["loss"]["mean"] == pytest.approx(sum(arm["losses"].values()) / 2)
        bits = report["held_out"]["tokens"] / report["held_out"]["bytes"] / 0.6931471805599453
        assert all(arm["bits_per_byte"][seed] == pytest.approx(arm["losses"][seed] * bits) for seed in ("1", "2"))
        assert arm["decode"]["tokens_per_second"] > 0
    differences = [mla["losses"][seed] - mha["losses"][seed] for seed in ("1", "2")]
    assert mla["difference"]["mean"] == pytest.approx(sum(differences) / 2)
    assert mha["difference"] is None
    table = (out / TABLE_FILE).read_text()
    for words in (f"| {mla['parameters']:,} |", f"{mla['loss']['mean']:.4f} ±", f"{mla['difference']['mean']:+.4f} ["):
        assert words in table
    assert "mla-12" in result.stdout and f"{mla['difference']['low']:+.4f}" in result.stdout
    assert (out / PLOT_FILE).read_bytes().startswith(b"\x89PNG")


def test_every_arm_reads_the_same_text_in_the_same_order(latentkv, asked, monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[tuple[int, int], list[list[int]]] = {}
    batch = Windows.batch

    def note(self: Windows, step: int):
        tokens = batch(self, step)
        read.setdefault((self._seed, step), []).append(tokens.flatten().tolist())
        return tokens

    monkeypatch.setattr(Windows, "batch", note)
    assert latentkv(*asked("out", "--no-speed")).exit_code == 0
    assert {seed for seed, _ in read} == {0, 1, 2}
    for (seed, _), batches in read.items():
        assert len(batches) == (4 if seed == 0 else 2)
        assert all(tokens == batches[0] for tokens in batches)
    assert read[1, 0][0] != read[2, 0][0]


def test_an_interrupted_comparison_goes_on_and_ends_alike(
    latentkv, asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert latentkv(*asked("whole", "--no-speed")).exit_code == 0
    steps: list[int] = []
    run, step = Trainer.run, Trainer.train_step

    def counted(self: Trainer):
        steps.append(self.step)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", counted)
    all_steps = 4 * SWEEP_STEPS + 4 * SMALL["--steps"]
    half = all_steps // 2
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", lambda self, folder, rep, _: run(self, folder, rep, lambda: len(steps) >= half))
        stopped = latentkv(*asked("parts", "--no-speed"))
    assert stopped.exit_code == 130
    assert "The same command goes on from there" in stopped.stderr
    assert 0 < json.loads((tmp_path / "parts" / REPORT_FILE).read_text())["finished"] < RUNS
    assert latentkv(*asked("parts", "--no-speed")).exit_code == 0
    assert len(steps) == all_steps
    assert findings(tmp_path / "parts") == findings(tmp_path / "whole")
    again = latentkv(*asked("parts", "--no-speed", "--json"))
    assert again.exit_code == 0 and len(steps) == all_steps
    assert json.loads(again.stdout)["arms"] == findings(tmp_path / "whole")


def test_arms_and_seeds_are_added_to_a_finished_comparison(
    latentkv, asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert latentkv(*asked("out", "--no-speed", seeds=1, lrs="1e-2")).exit_code == 0
    before = findings(tmp_path / "out")
    trained: list[int] = []
    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self, *args: trained.append(self.options.seed) or run(self, *args))
    more = asked("out", "--no-speed", arms="mha,mqa,mla-12", lrs="1e-2")
    assert latentkv(*more).exit_code == 0
    assert trained == [1, 2, 2, 2]
    mha, mqa, mla = findings(tmp_path / "out")
    assert [arm["losses"]["1"] for arm in (mha, mla)] == [arm["losses"]["1"] for arm in before]
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert mqa["cached_bytes"] == mla["cached_bytes"]
    pair = report["same_cache"][0]
    assert (pair["first"], pair["second"]) == ("mla-12", "mqa")
    assert pair["difference"]["mean"] == pytest.approx(mla["loss"]["mean"] - mqa["loss"]["mean"])


def test_without_matching_all_arms_have_one_width(latentkv, asked, tmp_path: Path) -> None:
    assert latentkv(*asked("out", "--no-speed", match="none", seeds=1, lrs="1e-2")).exit_code == 0
    mha, mla = findings(tmp_path / "out")
    assert mha["width"] == mla["width"]
    assert mha["parameters"] != mla["parameters"]


def test_other_options_in_the_same_folder_are_refused(latentkv, asked, texts: Path, tmp_path: Path) -> None:
    assert latentkv(*asked("out", "--no-speed", seeds=1, lrs="1e-2")).exit_code == 0
    kept = (tmp_path / "out" / REPORT_FILE).read_text()
    other = latentkv(*asked("out", "--no-speed", seeds=1, lrs="1e-2", steps=12, layers=2))
    assert other.exit_code == 2
    assert "other options (--layers 1, now 2; --steps 6, now 12): repeat those, or give another --out" in other.stderr
    (texts / "cat.txt").write_text("Another text. " * 300)
    other = latentkv(*asked("out", "--no-speed", seeds=1, lrs="1e-2"))
    assert other.exit_code == 2 and "another text" in other.stderr
    assert (tmp_path / "out" / REPORT_FILE).read_text() == kept


WRONG = [
    ({"arms": "mla-12,mqa"}, "--arms must name mha"),
    ({"arms": "mha"}, "--arms must name two or more attentions"),
    ({"arms": "mha,mha"}, "each once"),
    ({"arms": "mha,linear"}, "'linear' is not known; write mha, mqa, gqa-GROUPS or mla-RANK"),
    ({"arms": "mha,gqa-3"}, "gqa-3 does not divide 4 heads"),
    ({"arms": "mha,mla-9999"}, "mla-9999 has more parameters than MHA"),
    ({"match": "cache"}, "--match=cache is not known: choose parameters or none"),
    ({"seeds": 0}, "--seeds must be a whole number from 1 to 20, not 0."),
    ({"steps": 2}, "--steps must be a whole number from 3 to 2,147,483,647, not 2."),
    ({"lrs": "fast"}, "--lrs: 'fast' is no list of numbers"),
    ({"lrs": "1e-3,0"}, "--lrs must be a number above 0, not 0.0."),
    ({"hidden": 36}, "--hidden 36 gives 4 heads no width that is a multiple of 4"),
    ({"layers": 0}, "--layers must be a whole number from 1 to 1,024, not 0."),
    ({"vocab": 200}, "--vocab must be a whole number from 259 to 1,048,576, not 200."),
    ({"batch_tokens": 65}, "--batch-tokens 65 must be a multiple of --seq-len 16"),
    ({"eval_bytes": 0}, "--eval-bytes must be a whole number from 1 to 2,147,483,647, not 0."),
    ({"threads": 0}, "--threads must be a whole number from 1 to 1,024, not 0."),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_usage_is_one_sentence_and_nothing_is_written(
    latentkv, asked, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    result = latentkv(*asked("out", **changes))
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
