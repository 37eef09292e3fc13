"""Reports as pages that need nothing from outside: their style, and the parts that they are put together from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --ground: #f5f6f8; --card: #fff; --text: #1d2530; --faint: #667080; --line: #e3e7ec }
@media (prefers-color-scheme: dark) {
  :root { --ground: #11151b; --card: #1a2029; --text: #e6eaf0; --faint: #98a2b3; --line: #2c3440 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--text); font: 14px/1.5 system-ui, sans-serif }
main { max-width: 1000px; margin: 0 auto; padding: 28px 20px 40px }
h1 { margin: 0; font-size: 22px } h2 { margin: 0 0 8px; font-size: 15px }
p { margin: 4px 0 0 } .faint { color: var(--faint) } small, .faint { font-size: 12.5px }
.row { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); margin-top: 14px }
.wide { grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)) }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; min-width: 0 }
.number { font-size: 26px; font-weight: 600; line-height: 1.25 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: 5px 10px; text-align: right; border-top: 1px solid var(--line); white-space: nowrap }
th { font-weight: 600 } thead th { border-top: 0 }
th:first-child, td:first-child { text-align: left; padding-left: 0; font-weight: 400 }
td small { color: var(--faint) } img { display: block; width: 100% } .scroll { overflow-x: auto }
pre { margin: 6px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12.5px }
.heat { display: block; width: 100%; font-size: 12px } .heat text { text-anchor: middle; dominant-baseline: central }
.heat-ground { fill: var(--ground) } .heat-field { fill: #0072b2 } .heat-light { fill: #fff }
.heat-dark { fill: var(--text) } .heat .heat-label { fill: var(--faint) }
summary { cursor: pointer; font-weight: 600 }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page of HTML for a light or a dark screen; parts that are empty are left out. `title` is HTML already."""
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def card(title: str, number: str, detail: str) -> str:
    """One large number, what it is above it, and a line below."""
    return (
        f'<section><div class="faint">{title}</div><div class="number">{number}</div>'
        f'<div class="faint">{detail}</div></section>'
    )


def folded(title: str, content: str, *, opened: bool = False) -> str:
    """A part that a click on its title opens."""
    return (
        f'<div class="row"><section><details{" open" if opened else ""}><summary>{title}</summary>{content}</details>'
        "</section></div>"
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells of HTML; the first column is that of names."""
    head = "".join(f"<th>{each}</th>" for each in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def machine(environment: Mapping[str, Any]) -> str:
    """Where numbers were taken, as a report holds it (`cli.run_facts`): processor, threads, versions."""
    versions = [f"{name} {environment[name]}" for name in ("latentkv", "torch", "python") if environment.get(name)]
    threads = count(environment["threads"], "thread")
    if processes := environment.get("processes"):
        threads += f" in each of {processes} processes"
    return escape(", ".join([environment["cpu"], threads, *versions]))


def digits(number: float) -> str:
    """Four of them, zeros included."""
    return f"{number:#.4g}".removesuffix(".")


def count(number: int, noun: str) -> str:
    """So many of them: 1 token, 2 tokens."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
