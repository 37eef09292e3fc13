"""What a person sees of a run: a live line on a terminal, plain lines elsewhere, log.jsonl and loss.png in any case."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from latentkv.errors import TrainingError
from latentkv.files import write_text, write_whole
from latentkv.json_files import parse_json

Record = dict[str, Any]


class Reporter:
    """Prints records and appends them to `log.jsonl`; records after `resume_step` from an earlier run are dropped.

    With `silent` it does neither: another process reports.
    """

    def __init__(self, folder: Path, console: Console, *, resume_step: int = 0, silent: bool = False) -> None:
        self._console = Console(quiet=True) if silent else console
        self._path = Path(os.devnull) if silent else folder / "log.jsonl"
        self._live = None
        self.records: list[Record] = []
        if silent:
            return
        self.records = [r for r in _read_records(self._path) if r["step"] <= resume_step] if resume_step else []
        write_text(self._path, "".join(json.dumps(r) + "\n" for r in self.records))
        self._live = Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None

    def __enter__(self) -> Reporter:
        """Start the live line."""
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the live line."""
        if self._live:
            self._live.stop()

    def say(self, message: str) -> None:
        """A line of plain words."""
        self._console.print(Text(message))

    def live(self, record: Record) -> None:
        """Refresh the live line (nothing where there is no terminal)."""
        if self._live:
            self._live.update(Text(describe(record)))

    def log(self, record: Record) -> None:
        """Keep and print one record."""
        self.records.append(record)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._console.print(Text(f"{time.strftime('%H:%M:%S')} {describe(record)}"), soft_wrap=True)


def describe(record: Record) -> str:
    """One record as one line."""
    of = f" of {record['steps']:,}" if record.get("steps") else ""
    parts = [f"step {record['step']}{of}"]
    for key, form in (
        ("loss", "loss {:.3f}"),
        ("mtp_loss", "mtp {:.3f}"),
        ("lr", "lr {:.2e}"),
        ("grad_norm", "norm {:.2f}"),
        ("load", "load max/mean {:.2f}"),
        ("epochs", "epoch {:.2f}"),
        ("tokens_per_second", "{:,.0f} tok/s"),
    ):
        if record.get(key):
            parts.append(form.format(record[key]))
    for name, value in record.get("bits_per_byte", {}).items():
        parts.append(f"{name} {value:.3f} bits/byte")
    if "done" in record:
        parts.append(f"{record['done']:.0%}")
    if "eta" in record:
        parts.append(f"ETA {_duration(record['eta'])}")
    return "  ".join(parts)


def plot_losses(records: list[Record], path: Path, title: str) -> None:
    """Draw the training loss, and below it the held-out bits per byte, against tokens seen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses = [(r["tokens"] / 1e6, r["loss"]) for r in records if "loss" in r]
    evaluations = [(r["tokens"] / 1e6, r["bits_per_byte"]) for r in records if r.get("bits_per_byte")]
    figure = Figure(figsize=(10 if evaluations else 5.5, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if evaluations else 1, squeeze=False)
    if losses:
        axes[0, 0].plot(*zip(*losses, strict=True), linewidth=0.9, color="#3b6ea5")
    axes[0, 0].set_ylabel("training loss (nats per token)")
    if evaluations:
        for name in evaluations[-1][1]:
            points = [(x, values[name]) for x, values in evaluations if name in values]
            axes[0, 1].plot(*zip(*points, strict=True), marker=".", label=f"{name}: {points[-1][1]:.3f}")
        axes[0, 1].set_ylabel("held-out text (bits per byte)")
        axes[0, 1].legend(frameon=False)
    for axis in axes.flat:
        axis.set_xlabel("tokens (millions)")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))


def _read_records(path: Path) -> list[Record]:
    records: list[Record] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(parse_json(line, str(path), TrainingError))
        except TrainingError:  # the line that a kill cut short
            break
    return records


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
