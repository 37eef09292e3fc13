"""Several processes train the model that one would, and go on from each other's checkpoints, however many they are."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from latentkv.errors import TrainingError
from latentkv.train import TrainingPlan, TrainOptions, train_model
from latentkv.train.parts import Parts
from latentkv.train.ranks import rows_of
from rank_programs import BEGIN, ranks_of

TRAIN = (
    BEGIN
    + """
from pathlib import Path
from latentkv.train import TrainingPlan, TrainOptions, train_model
from latentkv.train.ranks import DataRanks
from latentkv.train.trainer import Trainer

if task["stop_after"]:
    run = Trainer.run
    # One process is told to stop: the others stop with it.
    def told(self, folder, reporter, should_stop):
        return run(self, folder, reporter, lambda: rank == "1" and self.step >= task["stop_after"])
    Trainer.run = told
task["options"]["betas"] = tuple(task["options"]["betas"])
ranks = DataRanks.join()
plan = TrainingPlan(*map(Path, task["plan"]))
with ranks.together():
    done = train_model(plan, TrainOptions(**task["options"]), ranks=ranks)
    ranks.leave()
print(json.dumps(done))
"""
)
OPTIONS = TrainOptions(
    steps=20,
    seq_len=16,
    batch_tokens=256,
    micro_batch=2,
    warmup=2,
    log_every=1,
    eval_every=10,
    dtype="fp32",
    bias_speed=0.02,
)


def train(size: int, plan: TrainingPlan, options: TrainOptions, stop_after: int = 0) -> list[bool]:
    """Whether the run is complete, as each process says."""
    paths = [str(plan.data), str(plan.out), str(plan.config)]
    task = {"plan": paths, "options": options.to_dict(), "stop_after": stop_after}
    with ranks_of(TRAIN, size, json.dumps(task)) as ranks:
        written = [(rank.stdout.read(), rank.stderr.read()) for rank in ranks]
        codes = [rank.wait(60) for rank in ranks]
    assert codes == [0] * size, "\n".join(err for _, err in written)
    assert all("Training" not in err and "step" not in err for _, err in written[1:])  # one of them reports
    return [json.loads(out) for out, _ in written]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def numbers(folder: Path, name: str) -> list[float]:
    return [record[name] for record in records(folder) if name in record]


def assert_trained_alike(got: Path, expected: Path, tolerance: float) -> None:
    for name in ("loss", "mtp_loss", "grad_norm"):
        assert numbers(got, name) == pytest.approx(numbers(expected, name), abs=tolerance, rel=tolerance)
    assert numbers(got, "load") == numbers(expected, "load")  # experts got as many tokens, so biases moved alike
    scores, own = (
        [score for record in records(folder) for score in record.get("bits_per_byte", {}).values()]
        for folder in (expected, got)
    )
    assert own == pytest.approx(scores, rel=tolerance)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (got, expected))
    assert ours.keys() == theirs.keys()
    # An update of AdamW is as long as the rate, whichever way a gradient near zero points.
    assert all((ours[name] - theirs[name]).abs().max() < 100 * tolerance for name in ours)


@pytest.fixture
def plan(tiny_config: Path, text_folder: Path, tmp_path: Path) -> TrainingPlan:
    return TrainingPlan(text_folder, tmp_path / "several", tiny_config)


@pytest.fixture
def alone(plan: TrainingPlan, tmp_path: Path) -> Path:
    """What one process has made of the plan."""
    one = replace(plan, out=tmp_path / "one")
    assert train_model(one, OPTIONS, Console(file=StringIO()))
    return one.out


@pytest.mark.parametrize(
    ("size", "steps"),
    [(2, 4), pytest.param(2, 20, marks=pytest.mark.rank), pytest.param(4, 20, marks=pytest.mark.rank)],
)
def test_several_processes_have_the_losses_of_one(plan: TrainingPlan, tmp_path: Path, size: int, steps: int):
    options = replace(OPTIONS, steps=steps, eval_every=steps // 2)
    assert train(size, plan, options) == [True] * size
    one = replace(plan, out=tmp_path / "one")
    assert train_model(one, options, Console(file=StringIO()))
    assert_trained_alike(plan.out, one.out, 1e-5)


@pytest.mark.rank
@pytest.mark.parametrize("size", [1, 4])
def test_a_run_goes_on_with_another_number_of_processes(plan: TrainingPlan, alone: Path, size: int):
    assert train(2, plan, OPTIONS, stop_after=7) == [False, False]
    (saved,) = (plan.out / "checkpoints").iterdir()
    assert saved.name == "step-00000007"
    assert {path.name for path in saved.iterdir()} == {
        "state.json",
        *(f"{kind}.json" for kind in ("weights", "optimizer")),
        *(f"{kind}-0000{rank}-of-00002.safetensors" for kind in ("weights", "optimizer") for rank in (1, 2)),
    }
    if size == 1:
        assert train_model(plan, OPTIONS, Console(file=StringIO()))
    else:
        assert train(size, plan, OPTIONS) == [True] * size
    assert_trained_alike(plan.out, alone, 1e-5)


@pytest.mark.rank
def test_a_run_of_one_process_goes_on_with_two(plan: TrainingPlan, alone: Path, monkeypatch: pytest.MonkeyPatch):
    from latentkv.train.trainer import Trainer

    run = Trainer.run
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", lambda self, folder, rep, _: run(self, folder, rep, lambda: self.step >= 7))
        assert not train_model(plan, OPTIONS, Console(file=StringIO()))
    assert train(2, plan, OPTIONS) == [True, True]
    assert_trained_alike(plan.out, alone, 1e-5)


@pytest.mark.rank
@pytest.mark.parametrize(("optimizer", "dtype", "tolerance"), [("muon", "fp32", 0.02), ("adamw", "bf16", 0.02)])
def test_muon_and_bf16_train_about_alike(
    plan: TrainingPlan, tmp_path: Path, optimizer: Any, dtype: Any, tolerance: float
):
    """Muon orthogonalises in bf16, and sums of bf16 gradients differ with their order."""
    options = replace(OPTIONS, optimizer=optimizer, dtype=dtype, steps=10)
    assert train(2, plan, options) == [True, True]
    one = replace(plan, out=tmp_path / "one")
    assert train_model(one, options, Console(file=StringIO()))
    assert numbers(plan.out, "loss") == pytest.approx(numbers(one.out, "loss"), rel=tolerance)


@pytest.mark.rank
def test_a_step_that_cannot_be_shared_out_is_refused(plan: TrainingPlan):
    task = {"plan": [str(plan.data), str(plan.out), str(plan.config)], "stop_after": 0}
    task["options"] = replace(OPTIONS, batch_tokens=96).to_dict()
    with ranks_of(TRAIN, 2, json.dumps(task)) as ranks:
        said = [rank.stderr.read() for rank in ranks]
        assert all(rank.wait(60) == 1 for rank in ranks)
    assert "3 micro-batches cannot be shared out among 2 processes" in said[0]


@pytest.mark.rank
def test_a_killed_process_ends_the_others_and_the_run_goes_on_from_its_last_checkpoint(plan: TrainingPlan, alone: Path):
    options = replace(OPTIONS, save_minutes=1e-6)
    task = {"plan": [str(plan.data), str(plan.out), str(plan.config)], "options": options.to_dict(), "stop_after": 0}
    with ranks_of(TRAIN, 2, json.dumps(task)) as ranks:
        deadline = time.monotonic() + 60
        while not list((plan.out / "checkpoints").glob("step-0000000[3-9]")):
            assert time.monotonic() < deadline and ranks[0].poll() is None
            time.sleep(0.01)
        ranks[1].send_signal(signal.SIGKILL)
        said = ranks[0].stderr.read()
        assert ranks[0].wait(30) not in (0, None)
    assert "RankError: Rank 1 is gone, or another one" in said
    assert train(2, plan, OPTIONS) == [True, True]
    assert_trained_alike(plan.out, alone, 1e-5)


@pytest.mark.parametrize(("length", "size"), [(7, 2), (1, 4), (9, 4), (5, 4), (8, 4), (0, 3)])
def test_rows_are_shared_out_as_torch_does(length: int, size: int):
    chunks = torch.arange(length).chunk(size) if length else ()
    for rank in range(size):
        first, last = rows_of(length, rank, size)
        assert last - first == (len(chunks[rank]) if rank < len(chunks) else 0)
        assert first == last or int(chunks[rank][0]) == first


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"shape": [4, 2], "files": {"w-1.safetensors": 0}}, r"is \[2, 2\], not \[4, 2\]"),
        ({"shape": [4, 2], "files": {"w-1.safetensors": 0, "w-2.safetensors": 3}}, "missing before row 3"),
        ({"shape": [4, 2], "files": {"../w-1.safetensors": 0}}, "what cannot be"),
        ({"shape": [4, -2], "files": {"w-1.safetensors": 0}}, "what cannot be"),
        ({"shape": [4, 2], "files": {}}, "what cannot be"),
    ],
)
def test_parts_that_make_no_tensor_are_refused(tmp_path: Path, entry: dict[str, Any], said: str):
    for number in (1, 2):
        save_file({"a": torch.ones(2, 2)}, tmp_path / f"w-{number}.safetensors")
    (tmp_path / "weights.json").write_text(json.dumps({"a": entry}))
    with pytest.raises(ValueError, match=said):
        Parts(tmp_path, "weights")["a"]


def test_a_damaged_table_of_parts_is_refused(tmp_path: Path):
    (tmp_path / "weights.json").write_text("{")
    with pytest.raises(TrainingError, match=r"weights\.json"):
        Parts(tmp_path, "weights")
