"""Lookup by length and depth as a picture: a field for each, darker where more answers are right."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from latentkv.evaluate.statistics import Share
from latentkv.sizes import format_tokens

_FIELD, _LEFT, _TOP, _BOTTOM = (76, 38), 56, 6, 40
_WHITE_FROM = 0.55
"""Share of right answers from which on the field is dark enough for white digits."""


def heat_map(title: str, shares: Mapping[tuple[int, int], Share]) -> str:
    """Inline SVG of shares by (length in tokens, depth in percent); a field that was not asked stays empty."""
    lengths, depths = (sorted({place[axis] for place in shares}) for axis in (0, 1))
    width = _LEFT + _FIELD[0] * len(lengths)
    height = _TOP + _FIELD[1] * len(depths) + _BOTTOM
    parts = [
        _field(lengths.index(length), depths.index(depth), share, f"{format_tokens(length)} tokens, {depth} %")
        for (length, depth), share in shares.items()
    ]
    parts += [
        _label(_LEFT - 8, _TOP + _FIELD[1] * (row + 0.5), f"{depth} %", "end") for row, depth in enumerate(depths)
    ]
    below = _TOP + _FIELD[1] * len(depths) + 13
    parts += [_label(_LEFT + _FIELD[0] * (i + 0.5), below, format_tokens(length)) for i, length in enumerate(lengths)]
    parts.append(_label(_LEFT + _FIELD[0] * len(lengths) / 2, below + 18, "tokens; down: depth in the text"))
    return (
        f'<svg class="heat" viewBox="0 0 {width} {height}" style="max-width: {1.25 * width:g}px" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def _field(column: int, row: int, share: Share, where: str) -> str:
    (width, height), x, y = _FIELD, _LEFT + _FIELD[0] * column, _TOP + _FIELD[1] * row
    place = f'x="{x + 1}" y="{y + 1}" width="{width - 2}" height="{height - 2}" rx="3"'
    digits = "heat-light" if share.value >= _WHITE_FROM else "heat-dark"
    return (
        f"<g><title>{where}: {share.right} of {share.total}</title>"
        f'<rect {place} class="heat-ground"/><rect {place} class="heat-field" fill-opacity="{share.value:.3f}"/>'
        f'<text x="{x + width / 2:g}" y="{y + height / 2:g}" class="{digits}">{share.value:.0%}</text></g>'
    )


def _label(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="heat-label" style="text-anchor: {anchor}">{text}</text>'
