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

from latentkv.convert import HealOptions, heal_checkpoint, read_record
from latentkv.errors import TrainingError
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
from latentkv.train.ranks import DataRanks

torch.set_num_threads(1)
latentkv.convert.heal_loop._SAVE_SECONDS = task["save_seconds"]

def told(stage, done, total):
    # Those that are named are told to stop: the others stop with them.
    if int(rank) in task["stopped"] and stage.startswith(("train", "match")) and done == task["stop_after"]:
        os.kill(os.getpid(), getattr(signal, task["sign"]))

tokens, held_out = (None if text is None else torch.tensor(text) for text in task["texts"])
ranks = DataRanks.join()
with ranks.together():
    options = HealOptions(**task["options"])
    healing = heal_checkpoint(*map(Path, task["models"]), tokens, options, held_out=held_out, on_progress=told, ranks=ranks)
    ranks.leave()
print(json.dumps(healing and asdict(healing)))
"""
)
TOKENS = some_tokens(16)
HELD_OUT = some_tokens(7, 48)
"""Fewer batches than can be shared out evenly."""
OPTIONS = HealOptions(steps=20, batch_size=8, lr=1e-3, eval_every=8)
LORA = replace(OPTIONS, train="lora", lora_rank=5, lora_alpha=5, lr=1e-2)


def task_of(
    models: tuple[Path, Path],
    options: HealOptions,
    *,
    texts: Sequence[torch.Tensor | None] = (TOKENS, TOKENS),
    stopped: Sequence[int] = (),
    stop_after: int = 7,
    sign: str = "SIGTERM",
    save_seconds: float = 60,
) -> str:
    source, folder = models
    return json.dumps(
        {
            "models": [str(folder), str(source)],
            "options": asdict(options),
            "texts": [None if text is None else text.tolist() for text in texts],
            "stopped": list(stopped),
            "stop_after": stop_after,
            "sign": sign,
            "save_seconds": save_seconds,
        }
    )


def heal(size: int, models: tuple[Path, Path], options: HealOptions, **how: Any) -> dict[str, Any] | None:
    """What so many processes say that they have done, all of them the same; None: they have stopped."""
    with ranks_of(HEAL, size, task_of(models, options, **how)) as ranks:
        written = [(rank.stdout.read(), rank.stderr.read()) for rank in ranks]
        codes = [rank.wait(60) for rank in ranks]
    assert codes == [0] * size, "\n".join(err for _, err in written)
    said = [json.loads(out) for out, _ in written]
    assert all(each == said[0] for each in said)
    return said[0]


def copied(models: tuple[Path, Path], name: str) -> tuple[Path, Path]:
    """The same source, and a copy of the converted model."""
    source, folder = models
    return source, Path(shutil.copytree(folder, folder.with_name(name)))


def assert_healed_alike(got: tuple[Path, Path], expected: tuple[Path, Path], tolerance: float = 1e-5) -> None:
    ours, theirs = (read_record(folder)["healings"][-1] for _, folder in (got, expected))
    assert ours.keys() == theirs.keys()
    for curve in ("matching", "curve"):
        assert [tokens for tokens, _ in ours[curve]] == [tokens for tokens, _ in theirs[curve]]
        assert [loss for _, loss in ours[curve]] == pytest.approx([loss for _, loss in theirs[curve]], abs=tolerance)
    assert len(ours["evaluations"]) == len(theirs["evaluations"])
    for mine, other in zip(ours["evaluations"], theirs["evaluations"], strict=True):
        assert mine == pytest.approx(other, rel=tolerance, abs=tolerance)
    weights, wanted = (load_file(folder / "model.safetensors") for _, folder in (got, expected))
    assert weights.keys() == wanted.keys()
    worst = {name: float((weights[name] - wanted[name]).abs().max()) for name in wanted}
    print(sorted(worst.items(), key=lambda x: -x[1])[:4])
    assert max(worst.values()) < tolerance
    assert not (got[1] / ".healing").exists()


CASES = {
    "all": OPTIONS,
    "attention": replace(OPTIONS, train="attention", match_steps=6),
    "matched": replace(OPTIONS, match_steps=20),
    "lora": replace(LORA, match_steps=4),
}


@pytest.mark.parametrize(
    ("models", "kind", "size"),
    [
        *(pytest.param(model, kind, size, marks=pytest.mark.rank)
          for model in ("llama", "qwen2") for kind in CASES for size in (2, 4)),
    ],
    indirect=["models"],
)
def test_several_processes_heal_as_one(models: tuple[Path, Path], kind: str, size: int):
    one = copied(models, "one")
    healing = heal(size, models, CASES[kind])
    alone = heal_checkpoint(one[1], one[0], TOKENS, CASES[kind], held_out=TOKENS)
    assert healing is not None and alone is not None
    assert healing["losses"] == pytest.approx(alone.losses, abs=1e-5)
    print(max(abs(a-b) for a,b in zip(healing["losses"], alone.losses)), healing["losses"][::5])
    assert_healed_alike(models, one)
