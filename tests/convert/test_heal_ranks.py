"""Several processes heal a model as one would, and go on from what other numbers of processes have saved."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sources import some_tokens

from command_line import run_here
from latentkv.convert import PAGE_FILE, Healing, HealOptions, heal_checkpoint, read_record
from rank_programs import BEGIN, ranks_of

pytestmark = pytest.mark.usefixtures("unpainted")

HEAL = (
    BEGIN
    + """
import signal
from dataclasses import asdict
from pathlib import Path
import torch
import latentkv.convert.heal_loop
from latentkv.convert import HealOptions, heal_checkpoint
from latentkv.train.ranks import DataRanks, own_rows

latentkv.convert.heal_loop._SAVE_SECONDS = task["save_seconds"]

def told(stage, done, total):
    # Those that are named hear a signal: the others stop with them.
    if int(rank) in task["stopped"] and stage.startswith(("train", "match")) and done == task["stop_after"]:
        os.kill(os.getpid(), getattr(signal, task["sign"]))

models, shard = [], DataRanks.shard
def noted(self, model, dtype):
    models.append(model)
    shard(self, model, dtype)
DataRanks.shard = noted

def held(model):
    # Of the weights of a model, those that are here, and all.
    weights = model.state_dict().values()
    return [sum(own_rows(weight)[0].numel() for weight in weights), sum(weight.numel() for weight in weights)]

tokens, held_out = (None if text is None else torch.tensor(text) for text in task["texts"])
folders, options = map(Path, task["folders"]), HealOptions(**task["options"])
ranks = DataRanks.join()
with ranks.together():
    healing = heal_checkpoint(*folders, tokens, options, held_out=held_out, on_progress=told, ranks=ranks)
    said = [healing and asdict(healing), *map(held, models)]
    ranks.leave()
print(json.dumps(said))
"""
)
COMMAND = (
    BEGIN
    + """
from latentkv.cli.app import main
sys.argv = ["latentkv", "heal", *task]
main()
"""
)
TOKENS = some_tokens(16)
HELD_OUT = TOKENS[:9]
"""Three batches, which cannot be shared out evenly between two."""
ALL = HealOptions(steps=20, batch_size=8, lr=1e-3, eval_every=8)
CASES = {
    "all": ALL,
    "attention": replace(ALL, train="attention", match_steps=6),
    "matched": replace(ALL, match_steps=20),
    "lora": replace(ALL, match_steps=4, train="lora", lora_rank=5, lora_alpha=5, lr=1e-2),
    "recomputed": replace(ALL, recompute=True, hidden_weight=0.0),
}
Models = tuple[Path, Path]
"""Source, and converted."""
OF_ONE = pytest.mark.parametrize("models", ["llama"], indirect=True)
"""What such a test tells apart is not of the source."""


def task_of(
    models: Models,
    options: HealOptions,
    *,
    held_out: torch.Tensor | None = HELD_OUT,
    stopped: Sequence[int] = (),
    stop_after: int = 7,
    sign: str = "SIGTERM",
    save_seconds: float = 60,
) -> str:
    source, folder = models
    return json.dumps(
        {
            "folders": [str(folder), str(source)],
            "options": asdict(options),
            "texts": [TOKENS.tolist(), None if held_out is None else held_out.tolist()],
            "stopped": list(stopped),
            "stop_after": stop_after,
            "sign": sign,
            "save_seconds": save_seconds,
        }
    )


def heal(size: int, models: Models, options: HealOptions, **how: Any) -> list[Any]:
    """What so many processes have done, as all of them say, and the weights that the first one held in the end."""
    with ranks_of(HEAL, size, task_of(models, options, **how)) as ranks:
        written = [(rank.stdout.read(), rank.stderr.read()) for rank in ranks]
        codes = [rank.wait(60) for rank in ranks]
    assert codes == [0] * size, "\n".join(err for _, err in written)
    said = [json.loads(out) for out, _ in written]
    assert all(each[0] == said[0][0] for each in said)
    return said[0]


def heal_alone(models: Models, options: HealOptions, held_out: torch.Tensor | None = HELD_OUT) -> Healing:
    """What one process does with a copy of the model, whose folder is `one`."""
    source, folder = models
    one = Path(shutil.copytree(folder, folder.with_name("one")))
    healing = heal_checkpoint(one, source, TOKENS, options, held_out=held_out)
    assert healing is not None
    return healing


def assert_healed_as_alone(models: Models, tolerance: float = 1e-5) -> None:
    """The model is that of `heal_alone`, and so is its report."""
    folder, one = models[1], models[1].with_name("one")
    ours, theirs = (read_record(each)["healings"][-1] for each in (folder, one))
    assert ours.keys() == theirs.keys()
    for curve in ("matching", "curve"):
        assert [tokens for tokens, _ in ours[curve]] == [tokens for tokens, _ in theirs[curve]]
        assert [loss for _, loss in ours[curve]] == pytest.approx([loss for _, loss in theirs[curve]], abs=tolerance)
    assert len(ours["evaluations"]) == len(theirs["evaluations"])
    for mine, other in zip(ours["evaluations"], theirs["evaluations"], strict=True):
        assert mine == pytest.approx(other, rel=tolerance, abs=tolerance)
    weights, wanted = (load_file(each / "model.safetensors") for each in (folder, one))
    assert weights.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=tolerance, msg=name)
    assert not (folder / ".healing").exists()


def assert_several_heal_as_one(models: Models, options: HealOptions, size: int) -> None:
    alone = heal_alone(models, options)
    healing, *held = heal(size, models, options)
    assert healing["losses"] == pytest.approx(alone.losses, abs=1e-5)
    assert healing["tokens"] == alone.tokens
    assert_healed_as_alone(models)
    # Of source and converted model each process has its part, and no more than the rounding up of rows.
    assert len(held) == 2 and all(here < 1.1 * whole / size for here, whole in held)


@OF_ONE
def test_two_processes_heal_as_one(models: Models):
    assert_several_heal_as_one(models, replace(ALL, steps=2, match_steps=1, eval_every=1), 2)


@pytest.mark.rank
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("train", CASES)
def test_several_processes_heal_as_one(models: Models, train: str, size: int):
    assert_several_heal_as_one(models, CASES[train], size)


@pytest.mark.rank
@pytest.mark.parametrize("models", ["llama tied"], indirect=True)
def test_three_processes_heal_a_model_whose_output_head_is_its_embedding_as_one(models: Models):
    assert_several_heal_as_one(models, replace(ALL, batch_size=6, match_steps=4), 3)


@pytest.mark.rank
@OF_ONE
def test_without_held_out_text_several_processes_hold_out_what_one_does(models: Models):
    heal_alone(models, ALL, held_out=None)
    assert heal(2, models, ALL, held_out=None)[0]["evaluations"] == []
    assert_healed_as_alone(models)


def files(folder: Path) -> dict[str, bytes]:
    """What a model is made of."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def saved(models: Models) -> Path:
    """The only moment of an interrupted healing that is kept."""
    (moment,) = (models[1] / ".healing").iterdir()
    return moment


@pytest.mark.rank
@OF_ONE
@pytest.mark.parametrize(
    ("size", "train", "stopped", "sign"),
    [
        (1, "all", [1], "SIGTERM"),
        (4, "all", [0, 1], "SIGINT"),
        (4, "lora", [1], "SIGINT"),
        (1, "lora", [0], "SIGTERM"),
        (4, "attention", [0, 1], "SIGTERM"),
    ],
)
def test_a_signal_to_one_or_all_stops_all_saves_once_and_any_number_goes_on(
    models: Models, size: int, train: str, stopped: list[int], sign: str
):
    before = files(models[1])
    alone = heal_alone(models, CASES[train])
    assert heal(2, models, CASES[train], stopped=stopped, sign=sign)[0] is None
    assert saved(models).name == "step-00000007"
    assert {path.name for path in saved(models).iterdir()} == {
        "state.json",
        *(f"{kind}.json" for kind in ("weights", "optimizer")),
        *(f"{kind}-0000{rank}-of-00002.safetensors" for kind in ("weights", "optimizer") for rank in (1, 2)),
    }
    assert files(models[1]) == before
    if size == 1:
        resumed = heal_checkpoint(models[1], models[0], TOKENS, CASES[train], held_out=HELD_OUT)
        assert resumed is not None
        losses = list(resumed.losses)
    else:
        losses = heal(size, models, CASES[train])[0]["losses"]
    assert losses == pytest.approx(alone.losses, abs=1e-5)
    assert_healed_as_alone(models)


@pytest.mark.rank
@OF_ONE
@pytest.mark.parametrize("size", [1, 2])
def test_a_healing_that_is_stopped_after_its_last_step_is_finished_by_any_number(models: Models, size: int):
    heal_alone(models, CASES["lora"])
    assert heal(2, models, CASES["lora"], stopped=[1], stop_after=20)[0] is None
    assert saved(models).name == "step-00000020"
    if size == 1:
        heal_checkpoint(models[1], models[0], TOKENS, CASES["lora"], held_out=HELD_OUT)
    else:
        heal(size, models, CASES["lora"])
    assert_healed_as_alone(models)


@pytest.mark.rank
@OF_ONE
@pytest.mark.parametrize("train", ["all", "lora"])
def test_two_processes_go_on_with_what_one_has_begun(models: Models, train: str, monkeypatch: pytest.MonkeyPatch):
    alone = heal_alone(models, CASES[train])

    def killed(stage: str, step: int, steps: int) -> None:
        if stage.startswith("train") and step == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr("latentkv.convert.heal_loop._SAVE_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        heal_checkpoint(models[1], models[0], TOKENS, CASES[train], held_out=HELD_OUT, on_progress=killed)
    assert heal(2, models, CASES[train])[0]["losses"] == pytest.approx(alone.losses, abs=1e-5)
    assert_healed_as_alone(models)


@pytest.mark.rank
@OF_ONE
def test_a_killed_process_ends_the_others_and_the_healing_goes_on_from_what_was_saved(models: Models):
    heal_alone(models, ALL)
    with ranks_of(HEAL, 2, task_of(models, ALL, save_seconds=0)) as ranks:
        deadline = time.monotonic() + 60
        while not list((models[1] / ".healing").glob("step-0000000[3-9]")):
            assert time.monotonic() < deadline and ranks[0].poll() is None
            time.sleep(0.01)
        ranks[1].send_signal(signal.SIGKILL)
        said = ranks[0].stderr.read()
        assert ranks[0].wait(30) not in (0, None)
    assert "RankError: Rank 1 is gone, or another one" in said
    heal(2, models, ALL)
    assert_healed_as_alone(models)


@pytest.mark.rank
@pytest.mark.parametrize("train", ["all", "lora"])
def test_a_healing_whose_first_process_ends_once_its_weights_are_written_is_noted_by_the_next(
    models: Models, train: str
):
    heal_alone(models, CASES[train])
    ends = """
import os
import latentkv.convert.heal
latentkv.convert.heal.add_healing = lambda *given, **how: os._exit(9)
"""
    with ranks_of(ends + HEAL, 2, task_of(models, CASES[train])) as ranks:
        said = ranks[1].stderr.read()
        assert [rank.wait(60) for rank in ranks] == [9, 1]
    assert "RankError: Rank 0 is gone" in said
    heal(2, models, CASES[train])
    assert_healed_as_alone(models)


@pytest.mark.rank
@OF_ONE
def test_a_model_that_became_worse_is_refused_by_all_and_stays_as_it_was(models: Models):
    before = files(models[1])
    with ranks_of(HEAL, 2, task_of(models, replace(ALL, steps=2, lr=5.0))) as ranks:
        said = [rank.stderr.read() for rank in ranks]
        assert all(rank.wait(60) == 1 for rank in ranks)
    assert all("TrainingError: Healing would make" in each for each in said)
    assert files(models[1]) == before and not (models[1] / ".healing").exists()


def arguments(models: Models, *options: object, folder: Path | None = None) -> list[str]:
    """Of `latentkv heal`, with text that the source writes."""
    source, converted = models
    sizes = ("--steps", 20, "--sequences", 16, "--length", 32, "--threads", 1)
    return [*map(str, (folder or converted, "--teacher", source, *sizes, *options)), "--json"]


def run_command(size: int, task: Sequence[str], begin: str = "") -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each of so many processes."""
    with ranks_of(begin + COMMAND, size, json.dumps(task)) as ranks:
        written = [(rank.stdout.read(), rank.stderr.read()) for rank in ranks]
        return [(rank.wait(60), *each) for rank, each in zip(ranks, written, strict=True)]


@pytest.mark.rank
@OF_ONE
def test_the_command_writes_its_text_once_stops_at_a_signal_and_goes_on(models: Models):
    one = Path(shutil.copytree(models[1], models[1].with_name("one")))
    alone = run_here("heal", *arguments(models, folder=one))
    assert alone.exit_code == 0, alone.stderr
    told = """
import os, signal, sys
from latentkv.convert import heal_loop
from latentkv.cli import conversion
distance, text_of, calls = heal_loop.backward_distance, conversion.text_tokens, []
def stopped(*given, **how):
    calls.append(given)
    if rank == "1" and len(calls) == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return distance(*given, **how)
def written(*given, **how):
    print("text is written", file=sys.stderr)
    return text_of(*given, **how)
heal_loop.backward_distance, conversion.text_tokens = stopped, written
"""
    (first, *said), (second, *silent) = run_command(2, arguments(models), told)
    assert (first, second) == (130, 130)
    assert said == ["", "text is written\nStopped and saved. The same command goes on from there.\n"]
    assert silent == ["", ""]
    (first, out, _), (second, *silent) = run_command(2, arguments(models))
    assert (first, second, silent) == (0, 0, ["", ""])
    healing, wanted = json.loads(out), json.loads(alone.stdout)
    assert healing["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
    assert_healed_as_alone(models)
    assert read_record(models[1])["healings"][0]["environment"]["processes"] == 2
    assert "1 thread in each of 2 processes" in (models[1] / PAGE_FILE).read_text()


@pytest.mark.rank
@OF_ONE
def test_a_batch_that_cannot_be_shared_out_is_refused_by_all(models: Models):
    for code, out, said in run_command(3, arguments(models)):
        assert (code, out) == (2, "")
        assert said == (
            "error: A batch of 8 sequences cannot be shared out among 3 processes: make --batch-size a multiple of 3.\n"
        )


@pytest.mark.rank
@OF_ONE
def test_where_the_first_process_cannot_read_the_text_all_end(models: Models):
    first, second = run_command(2, arguments(models, "--data", __file__))
    assert first[0] == 2 and first[2].startswith("error: ") and "has no tokenizer to read" in first[2]
    assert second[0] == 1 and second[2].splitlines()[-1].startswith("error: Rank 0 ")
