"""Figures in words, the same ones on the page and in the terminal."""

from __future__ import annotations

import math

from latentkv.evaluate.report import TextReport
from latentkv.evaluate.statistics import Estimate, Paired, Share

_MOST_PLACES = 8


def figure(estimate: Estimate | None, *, signed: bool = False) -> str:
    """A mean and its standard error, with two digits of the error; four of the mean where there is none."""
    if estimate is None:
        return "beyond 1e308"
    sign = "+" if signed else ""
    if not estimate.error:
        return format(estimate.mean, f"{sign}#.4g").removesuffix(".")
    places = min(max(0, 1 - math.floor(math.log10(estimate.error))), _MOST_PLACES)
    return f"{estimate.mean:{sign},.{places}f} ± {estimate.error:,.{places}f}"


def percent(estimate: Estimate, *, signed: bool = False) -> str:
    """A share and its standard error, in percent."""
    if not estimate.error:
        return f"{100 * estimate.mean:{'+' if signed else ''}.1f} %"
    return f"{figure(estimate.times(100), signed=signed)} %"


def right(share: Share | None) -> str:
    """Right answers, and the interval of their share."""
    if share is None:
        return ""
    return f"{share.value:.0%} ({share.right} of {share.total}; {share.low:.0%} to {share.high:.0%})"


def beside(pair: Paired | None) -> str:
    """The difference to the source, and the answers that it comes from."""
    if pair is None:
        return ""
    alone = f"only the model {pair.only_model}, only the source {pair.only_source}"
    return f"{percent(pair.difference, signed=True)} ({alone})"


def text_rows(text: TextReport) -> list[tuple[str, str, str, str]]:
    """(what, model, source, difference) of the scored text."""
    model, source, pair = text.model, text.source, text.pair
    rows = [
        ("perplexity", figure(model.perplexity), figure(source.perplexity) if source else "", ""),
        ("bits a byte", figure(model.bits_per_byte), figure(source.bits_per_byte) if source else "", ""),
    ]
    if pair is None:
        return rows
    ratio = pair.perplexity_ratio
    change = figure(None) if ratio is None else percent(Estimate(ratio.mean - 1, ratio.error), signed=True)
    rows[0] = (*rows[0][:3], change)
    return [
        *rows,
        ("nats a token", "", "", figure(pair.difference, signed=True)),
        ("KL(source || model), nats a token", figure(pair.divergence), "", ""),
        ("likeliest token the source's", percent(pair.agreement), "", ""),
    ]
