"""An evaluation as one page that needs nothing from outside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from latentkv.evaluate.heat_map import heat_map
from latentkv.evaluate.report import Report, TaskReport
from latentkv.evaluate.wording import beside, right, text_rows
from latentkv.html_page import card, count, digits, folded, machine, page, table


def render_page(report: Report) -> str:
    """The page of a report; what is not known yet is left out."""
    name = escape(report.model)
    against = f", beside {escape(report.source)}" if report.source else ""
    return page(
        f"{name}: evaluation",
        [
            f"<h1>{name}, evaluated{against}</h1>",
            _cards(report),
            _text(report),
            _tasks(report),
            *(_maps(report, task) for task in report.tasks if task.cells),
            _notes(report),
            _origin(report.facts),
        ],
    )


def _cards(report: Report) -> str:
    cards: list[str] = []
    if report.text is not None:
        model, pair = report.text.model, report.text.pair
        if model.perplexity is not None:
            cards.append(
                card("Perplexity", digits(model.perplexity.mean), f"{model.bits_per_byte.mean:.3f} bits a byte")
            )
        if pair is not None:
            cards.append(card("KL to the source", f"{pair.divergence.mean:.4f}", "nats a token"))
            cards.append(card("Likeliest token the same", f"{pair.agreement.mean:.1%}", "as in the source"))
    for task in report.tasks:
        source = "" if task.source is None else f"; the source {task.source.value:.0%}"
        detail = f"{task.model.right} of {task.model.total} right{source}"
        cards.append(card(task.name.capitalize(), f"{task.model.value:.0%}", detail))
    return f'<div class="row">{"".join(cards)}</div>' if cards else ""


def _text(report: Report) -> str:
    if (text := report.text) is None:
        return ""
    pairs = "; of differences, over pairs of windows" if report.source else ""
    said = (
        f"{count(text.model.tokens, 'token')} ({text.bytes:,} bytes) of {escape(', '.join(report.texts))} in "
        f"{count(text.windows, 'window')}, each read by itself. After ±: one standard error over the windows{pairs}."
    )
    return _section("Text", report, text_rows(text), said)


def _tasks(report: Report) -> str:
    if not report.tasks:
        return ""
    rows = [(task.name, right(task.model), right(task.source), beside(task.pair)) for task in report.tasks]
    form, shots = "by the chat template" if report.chat else "as plain text", report.options["shots"]
    said = (
        f"Asked {form}, each question after {count(shots, 'other')} with answers; an answer is right if it begins with "
        "the words that are wanted. In parentheses: the 95 % interval, by Wilson's method."
    )
    return _section("Tasks", report, rows, said)


def _maps(report: Report, task: TaskReport) -> str:
    """A picture of the model, and one of the source."""
    pictures: list[str] = []
    for what, name in (("model", report.model), ("source", report.source)):
        shares = {(cell.length, cell.depth): share for cell in task.cells if (share := getattr(cell, what)) is not None}
        if shares:
            title = f"{task.name.capitalize()}: right answers of {name}"
            pictures.append(f"<section><h2>{escape(title)}</h2>{heat_map(title, shares)}</section>")
    return f'<div class="row wide">{"".join(pictures)}</div>'


def _notes(report: Report) -> str:
    if not report.notes:
        return ""
    return folded("Left out", "".join(f"<p>{escape(note)}.</p>" for note in report.notes), opened=True)


def _origin(facts: Mapping[str, Any]) -> str:
    """Command and machine."""
    if "command" not in facts:
        return ""
    told = f"<pre>{escape(facts['command'])}</pre><p class='faint'>{machine(facts['environment'])}</p>"
    return folded("How it was made", told, opened=True)


def _section(title: str, report: Report, rows: Iterable[Sequence[str]], said: str) -> str:
    """A table of (what, model, source, difference), without the last two where there is no source."""
    heads = ["", "model", "source", "difference"] if report.source else ["", "model"]
    content = table(heads, ([escape(cell) for cell in row[: len(heads)]] for row in rows))
    return (
        f'<div class="row"><section><h2>{title}</h2><div class="scroll">{content}</div><p class="faint">{said}</p>'
        "</section></div>"
    )
