"""The comparison as rows of words, for Markdown and for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from latentkv.bench.models.decode_speed import DEPTH
from latentkv.compare.options import SWEEP_SEED
from latentkv.compare.report import ArmReport, Report
from latentkv.compare.sizes import BASELINE
from latentkv.compare.statistics import Difference, Spread

Row = Sequence[str]
_NONE = "-"


def result_rows(report: Report) -> list[Row]:
    """A head, and a row an arm."""
    baseline = next(arm for arm in report.arms if arm.name == BASELINE)
    timed = any(arm.decode for arm in report.arms)
    head = [
        "attention",
        "parameters",
        "cached numbers a token",
        "bytes, bf16",
        "of MHA",
        "learning rate",
        "loss, nats a token",
        "difference to MHA, 95 %",
        "bits a byte",
        *([f"tokens/s at {DEPTH:,}"] if timed else []),
    ]
    return [head, *([*_cells(arm, baseline), *([_speed(arm)] if timed else [])] for arm in report.arms)]


def sweep_rows(report: Report) -> list[Row]:
    """A head, and a row an arm: the losses that its learning rate was chosen by. Empty where none was."""
    rates = sorted({rate for arm in report.arms for rate in arm.sweep})
    if not rates:
        return []
    body = [[arm.name, *(_sweep_cell(arm, rate) for rate in rates)] for arm in report.arms]
    return [["attention", *(f"{rate:g}" for rate in rates)], *body]


def notes(report: Report) -> list[str]:
    """What has to be said with the numbers."""
    options, training, held_out = report.options, report.training, report.held_out
    lines = [
        f"{options.sizes.num_layers} layers, hidden {options.sizes.hidden_size}, {options.sizes.num_heads} heads of "
        f"{options.sizes.head_dim}; sequences of {options.seq_len}; {options.steps:,} steps of "
        f"{options.batch_tokens:,} tokens ({training['tokens_of_a_run'] / 1e6:.2f} M of {training['tokens'] / 1e6:.2f} "
        f"M); measured on {held_out['tokens']:,} tokens ({held_out['bytes']:,} bytes) of "
        f"{', '.join(held_out['names'])}. Loss: mean and standard deviation of the seeds.",
    ]
    if report.finished < report.total:
        lines.append(f"Not complete: {report.finished} of {report.total} runs are finished.")
    lines += [
        f"At the same cache: {pair.first} less {pair.second}: {_difference(pair.difference)} nats a token."
        for pair in report.same_cache
    ]
    if edges := [arm.name for arm in report.arms if arm.rate_at_edge]:
        lines.append(
            f"The best learning rate tried is the smallest or largest of --lrs for {', '.join(edges)}: a wider range "
            "may be better for them."
        )
    return lines


def sweep_title(report: Report) -> str:
    """What the sweep's numbers are."""
    return (
        f"Loss after {report.options.sweep_steps:,} steps with seed {SWEEP_SEED}, by learning rate (the full runs have "
        f"other seeds and {report.options.steps:,} steps)"
    )


def as_markdown(report: Report) -> str:
    """Both tables and the notes."""
    parts = [_markdown(result_rows(report)), *notes(report)]
    if sweep := sweep_rows(report):
        parts += [f"{sweep_title(report)}:", _markdown(sweep)]
    return "\n\n".join(parts) + "\n"


def _markdown(rows: Sequence[Row]) -> str:
    head, *body = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def _cells(arm: ArmReport, baseline: ArmReport) -> list[str]:
    return [
        arm.name,
        f"{arm.parameters:,}",
        f"{arm.cached_numbers:,}",
        f"{arm.cached_bytes:,}",
        f"1/{baseline.cached_bytes / arm.cached_bytes:.3g}",
        _NONE if arm.rate is None else f"{arm.rate:g}",
        _spread(arm.loss),
        _NONE if arm.difference is None else _difference(arm.difference),
        _NONE if arm.bits is None else f"{arm.bits.mean:.4f}",
    ]


def _spread(found: Spread | None) -> str:
    if found is None:
        return _NONE
    return f"{found.mean:.4f}" if found.deviation is None else f"{found.mean:.4f} ± {found.deviation:.4f}"


def _difference(found: Difference) -> str:
    if found.low is None or found.high is None:
        return f"{found.mean:+.4f} (one pair)"
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _speed(arm: ArmReport) -> str:
    return _NONE if arm.decode is None else f"{arm.decode.tokens_per_second:,.0f}"


def _sweep_cell(arm: ArmReport, rate: float) -> str:
    if rate not in arm.sweep:
        return _NONE
    loss = arm.sweep[rate]
    words = "diverged" if loss is None else f"{loss:.4f}"
    return f"{words} (chosen)" if rate == arm.rate else words
