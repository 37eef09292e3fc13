"""The runs of a comparison: each is trained once, and its result is a file."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from latentkv.compare.arms import Arm
from latentkv.compare.options import CompareOptions
from latentkv.compare.text import HeldOut, Text
from latentkv.errors import DivergedError, RequestError
from latentkv.files import write_json
from latentkv.fingerprint import fingerprint
from latentkv.json_files import INDEX_BYTES, read_json
from latentkv.resumable import found_in
from latentkv.saved_values import as_saved
from latentkv.targets import require_folder
from latentkv.train import TrainingPlan, TrainOptions, prepare_text, train_model

_OPTIONS_FILE = "options.json"


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        arm: name of the attention.
        rate: peak learning rate.
        seed: of the first weights and of the data's order.
        steps: optimiser steps.
        keep: whether the trained model is wanted afterwards.
    """

    arm: Arm
    rate: float
    seed: int
    steps: int
    keep: bool

    @property
    def name(self) -> str:
        """Unlike that of any other run of the comparison."""
        return f"{self.arm.name}_lr{self.rate:g}_seed{self.seed}_steps{self.steps}"


@dataclass(frozen=True)
class RunResult:
    """What came of a run.

    Attributes:
        loss: nats a token on the held-out text; None: training diverged.
        bits_per_byte: on the same; None: training diverged.
        minutes: of training.
        threads: torch threads.
    """

    loss: float | None
    bits_per_byte: float | None
    minutes: float
    threads: int


def require_comparison(out: Path) -> None:
    """Refuse, before any text is read, a folder that is neither new nor a comparison's.

    Raises:
        RequestError: it is a file, not writable, or holds something else.
    """
    require_folder(out, RequestError)
    if out.exists() and not (out / _OPTIONS_FILE).exists() and any(out.iterdir()):
        raise RequestError(f"{out} holds something else than a comparison: give a new folder as --out.")


class RunFolder:
    """The folder of a comparison: one tokenizer and one encoded text, a folder and a result file a run."""

    def __init__(self, out: Path, text: Text, options: CompareOptions) -> None:
        """Make the folder, or go on in it.

        Raises:
            RequestError: `out` holds a comparison with other options or other text, or something else.
        """
        self.out = out
        self._text = text
        self._options = options
        self._facts = options.fixed() | {"text": text.digest()}
        if (out / _OPTIONS_FILE).exists():
            _require_same(out, read_json(out / _OPTIONS_FILE, RequestError), self._facts)
        else:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / _OPTIONS_FILE, self._facts)
        text.train_tokenizer(self._tokenizer, options.sizes.vocab_size)
        self.held_out: HeldOut = text.held_out(self._tokenizer)

    def result(self, run: Run) -> RunResult | None:
        """What came of a run; None where it has not been finished."""
        remedy = "remove it, and the same command trains this run again"
        return found_in(
            self._result_file(run), self._described(run), partial(as_saved, RunResult), RequestError, remedy
        )

    def model(self, run: Run) -> Path:
        """Where the trained model of a run is."""
        return self.out / "runs" / run.name

    def train(self, run: Run, console: Console) -> RunResult | None:
        """Train, or go on from a checkpoint; None: it was interrupted.

        Raises:
            DivergedError: training diverged, and it was not one to choose a learning rate by.
        """
        folder, plan = self.model(run), self._plan(run)
        try:
            if not train_model(plan, self._training(run), console):
                return None
            result = self._measured(read_json(folder / "training.json", RequestError, most_bytes=INDEX_BYTES))
        except DivergedError:
            if run.keep:
                raise
            result = RunResult(None, None, 0.0, torch.get_num_threads())
        write_json(self._result_file(run), self._described(run) | asdict(result))
        shutil.rmtree(folder / "checkpoints" if run.keep else folder, ignore_errors=True)
        return result

    def prepare(self, runs: Sequence[Run], console: Console) -> None:
        """Write what several runs read, so that processes which train some each only read it."""
        for run in runs:
            if self.result(run) is None:
                prepare_text(self._plan(run), console)

    def _plan(self, run: Run) -> TrainingPlan:
        config, content = self.out / "arms" / f"{run.arm.name}.json", self._config(run)
        if not config.exists() or read_json(config, RequestError) != content:
            config.parent.mkdir(exist_ok=True)
            write_json(config, content)
        return TrainingPlan(
            data=self._text.data,
            out=self.model(run),
            config=config,
            tokenizer=self._tokenizer,
            eval_files=self._text.eval_files,
            eval_bytes=self._text.eval_bytes,
            encoded=self.out / "data",
        )

    @property
    def _tokenizer(self) -> Path:
        return self.out / "tokenizer"

    def _result_file(self, run: Run) -> Path:
        return self.out / "runs" / f"{run.name}.json"

    def _described(self, run: Run) -> dict[str, Any]:
        decides = [self._facts, self._config(run), self._training(run).to_dict()]
        return {
            "arm": run.arm.name,
            "lr": run.rate,
            "seed": run.seed,
            "steps": run.steps,
            "fingerprint": fingerprint([decides]),
        }

    def _config(self, run: Run) -> dict[str, Any]:
        return run.arm.config_json(self._options.sizes, self._options.width(run.arm))

    def _training(self, run: Run) -> TrainOptions:
        return self._options.training(steps=run.steps, rate=run.rate, seed=run.seed)

    def _measured(self, summary: Mapping[str, Any]) -> RunResult:
        bits = self.held_out.mean_bits(summary["bits_per_byte"])
        return RunResult(self.held_out.loss(bits), bits, summary["minutes"], torch.get_num_threads())


def _require_same(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [
        "another text" if name == "text" else f"--{name} {before.get(name)}, now {value}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if changed:
        raise RequestError(
            f"{out} holds a comparison with other options ({'; '.join(changed)}): repeat those, or give another --out."
        )
