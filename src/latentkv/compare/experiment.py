"""`compare_attention`: choose each arm's learning rate, train every arm with every seed, and say what was found."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from latentkv.bench.environment import describe_environment
from latentkv.bench.models.decode_speed import DEPTH, measure_decode
from latentkv.compare.arms import Arm
from latentkv.compare.options import SWEEP_SEED, CompareOptions
from latentkv.compare.plot import plot_comparison
from latentkv.compare.report import ArmReport, Report, Speed, choose_rate, report_arm, same_cache_pairs
from latentkv.compare.runs import Run, RunFolder, RunResult, require_comparison
from latentkv.compare.sizes import BASELINE
from latentkv.compare.table import as_markdown
from latentkv.compare.text import Text
from latentkv.errors import RequestError, TrainingError
from latentkv.files import write_json, write_text
from latentkv.json_files import read_json
from latentkv.resumable import found_in
from latentkv.saved_values import as_saved
from latentkv.train.ranks import DataRanks

REPORT_FILE, TABLE_FILE, PLOT_FILE = "compare.json", "compare.md", "compare.png"
_SPEED_FILE = "speed.json"


def compare_attention(
    data: Path,
    eval_files: Sequence[Path],
    out: Path,
    options: CompareOptions,
    console: Console | None = None,
    *,
    speed: bool = True,
    ranks: DataRanks | None = None,
) -> Report | None:
    """Train the same decoder with several attentions, and measure all of them on the same held-out text.

    Same data in the same order for the same seed, same tokens, same tries at a learning rate. Report, table and plot
    are written anew after each run. The same call goes on where an earlier one was interrupted, and may ask for more
    arms, seeds or learning rates.

    Args:
        data: a folder of .txt files, or one.
        eval_files: texts to measure on, held out of training and of the tokenizer.
        out: a new folder, or that of the same comparison.
        options: what is compared.
        console: where to tell of the runs; None: standard error.
        speed: whether to measure how fast the trained models decode.
        ranks: processes that share the runs out among them, each run in one; None: this one alone.

    Returns:
        What was found; None when it was interrupted.

    Raises:
        RequestError: the options cannot be used, or are not those of the comparison in `out`.
        TrainingError: the text cannot be used, or training diverged.
    """
    ranks = ranks or DataRanks()
    console = console or Console(stderr=True)
    with ranks.first_alone():
        require_comparison(out)
        text = Text.find(data, eval_files, options.eval_bytes)
        with console.status("Text"):
            folder = RunFolder(out, text, options)
    return _Experiment(folder, text, options, console, ranks).run(speed=speed)


class _Experiment:
    def __init__(
        self, folder: RunFolder, text: Text, options: CompareOptions, console: Console, ranks: DataRanks
    ) -> None:
        self._folder, self._text, self._options, self._console = folder, text, options, console
        self._ranks = ranks
        self._arms = options.list_arms()
        self._seeds = range(SWEEP_SEED + 1, SWEEP_SEED + 1 + options.seeds)
        self._results: dict[str, RunResult] = {}
        self._steps = 0  # of all of them

    def run(self, *, speed: bool) -> Report | None:
        """All runs, those that are finished left out; by seed, so that an early end still compares all arms."""
        sweep = [run for arm in self._arms for run in self._sweep(arm)]
        if not self._finish_all(sweep):
            return None
        for arm in self._arms:
            if self._rate(arm) is None:
                raise TrainingError(f"{arm.name} diverged with every learning rate of --lrs: give smaller ones.")
        if not self._finish_all([run for seed in self._seeds for run in self._full_runs(seed)]):
            return None
        with self._ranks.first_alone():  # the others find the speeds measured
            return self._write(self._speeds() if speed else {})

    def _finish_all(self, runs: Sequence[Run]) -> bool:
        """Have the results of runs, of which other processes train theirs; whether nobody was interrupted."""
        with self._ranks.first_alone():
            if self._ranks.size > 1 and self._ranks.is_first:
                self._folder.prepare(runs, self._console)
        finished = all(self._finish(run) for run in self._ranks.own(runs))
        if self._ranks.any(not finished):
            return False
        return all(self._finish(run) for run in runs)

    def _sweep(self, arm: Arm) -> list[Run]:
        """The short runs that choose a learning rate; none where there is nothing to choose."""
        rates = list(dict.fromkeys(self._options.rates))
        steps = self._options.sweep_steps
        return [Run(arm, rate, SWEEP_SEED, steps, keep=False) for rate in rates] if len(rates) > 1 else []

    def _full_runs(self, seed: int) -> list[Run]:
        """Of all arms whose learning rate is known."""
        rates = {arm: self._rate(arm) for arm in self._arms}
        return [Run(arm, rate, seed, self._options.steps, keep=True) for arm, rate in rates.items() if rate is not None]

    def _finish(self, run: Run) -> bool:
        """Have a run's result; whether it was not interrupted."""
        known = self._folder.result(run)
        if known is None:
            what = f"{run.arm.name}, learning rate {run.rate:g}, seed {run.seed}, {run.steps:,} steps"
            self._console.rule(f"run {len(self._results) + 1} of {self._total}{self._left()}: {what}", align="left")
        result = known or self._folder.train(run, self._console)
        if result is None:
            return False
        if run.name not in self._results:
            self._results[run.name] = result
            self._steps += run.steps
        if known is None:
            self._write({})
        return True

    def _left(self) -> str:
        """About how long the rest takes; nothing before that is known."""
        spent = self._minutes
        if not spent:
            return ""
        options = self._options
        sweep = options.sweep_steps * sum(len(self._sweep(arm)) for arm in self._arms)
        left = sweep + options.steps * options.seeds * len(self._arms) - self._steps
        return f", about {math.ceil(spent * left / self._steps)} min left"

    @property
    def _minutes(self) -> float:
        return sum(result.minutes for result in self._results.values())

    @property
    def _total(self) -> int:
        return sum(len(self._sweep(arm)) + len(self._seeds) for arm in self._arms)

    def _losses(self, arm: Arm) -> dict[float, float | None]:
        """Of the short runs that are finished, by learning rate."""
        return {run.rate: self._results[run.name].loss for run in self._sweep(arm) if run.name in self._results}

    def _rate(self, arm: Arm) -> float | None:
        return choose_rate(self._losses(arm), self._options.rates) if self._sweep(arm) else self._options.rates[0]

    def _finished(self, arm: Arm) -> dict[int, RunResult]:
        """The full runs of an arm by seed."""
        runs = [run for seed in self._seeds for run in self._full_runs(seed) if run.arm == arm]
        return {run.seed: self._results[run.name] for run in runs if run.name in self._results}

    def _speeds(self) -> dict[str, Speed]:
        """Of each arm's first model; measured once."""
        path = self._folder.out / _SPEED_FILE
        models = {run.arm.name: self._folder.model(run) for run in self._full_runs(self._seeds[0])}
        asked = {"models": {name: folder.name for name, folder in models.items()}, "depth": DEPTH}

        def read(stored: dict[str, Any]) -> dict[str, Speed]:
            return {name: as_saved(Speed, stored["speeds"][name]) for name in models}

        remedy = "remove it, and the same command measures again"
        known = found_in(path, {"asked": asked}, read, RequestError, remedy)
        if known is not None:
            return known
        with self._console.status("Decode speed"):
            found = measure_decode(models, torch.bfloat16)
        speeds = {name: Speed(found.tokens_per_second[name], found.spread[name]) for name in models}
        write_json(path, {"asked": asked, "speeds": {name: asdict(one) for name, one in speeds.items()}})
        return speeds

    def _write(self, speeds: dict[str, Speed]) -> Report:
        """Report, table and plot of what is known by now."""
        report, out = self._report(speeds), self._folder.out
        if not self._ranks.is_first:
            return report
        write_json(out / REPORT_FILE, report.as_json())
        write_text(out / TABLE_FILE, as_markdown(report))
        if any(arm.losses for arm in report.arms):
            plot_comparison(report, out / PLOT_FILE)
        return report

    def _report(self, speeds: dict[str, Speed]) -> Report:
        options, data = self._options, read_json(self._folder.out / "data" / "tokens.bin.json", RequestError)
        finished = {arm.name: self._finished(arm) for arm in self._arms}
        losses, bits = (
            {
                name: {seed: value for seed, one in runs.items() if (value := getattr(one, field)) is not None}
                for name, runs in finished.items()
            }
            for field in ("loss", "bits_per_byte")
        )
        arms: dict[str, ArmReport] = {
            arm.name: report_arm(
                arm,
                options,
                sweep=self._losses(arm),
                rate=self._rate(arm),
                losses=losses[arm.name],
                bits_per_byte=bits[arm.name],
                baseline=losses[BASELINE],
                decode=speeds.get(arm.name),
            )
            for arm in self._arms
        }
        held_out = self._folder.held_out
        return Report(
            command=["latentkv", *sys.argv[1:]],
            environment=describe_environment(torch.get_num_threads()),
            options=options,
            training={
                **{name: data[name] for name in ("documents", "bytes", "tokens")},
                "tokens_of_a_run": options.steps * options.batch_tokens,
            },
            held_out={
                "names": [one.name for one in held_out.sets],
                "bytes": held_out.num_bytes,
                "tokens": held_out.num_tokens,
            },
            finished=len(self._results),
            total=self._total,
            minutes=round(self._minutes, 1),
            arms=list(arms.values()),
            same_cache=same_cache_pairs(self._arms, arms),
        )
