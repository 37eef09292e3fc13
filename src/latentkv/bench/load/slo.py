"""Goodput: requests that kept what their users were promised."""

from __future__ import annotations

import re
from collections.abc import Mapping

from latentkv.errors import RequestError

SLO_METRICS = ("ttft", "itl", "tpot", "e2e")
_LIMIT = re.compile(r"(\w+)\s*=\s*(\d+(?:\.\d+)?)\s*(ms|s)")


def parse_slo(text: str) -> Mapping[str, float]:
    """Read "ttft=1s,itl=200ms" as milliseconds by metric.

    Raises:
        RequestError: a metric or a time is unknown.
    """
    limits: dict[str, float] = {}
    for part in text.split(","):
        match = _LIMIT.fullmatch(part.strip())
        if match is None or match[1] not in SLO_METRICS:
            raise RequestError(
                f"{part.strip()!r} is no objective; write for example ttft=1s,itl=200ms, of {', '.join(SLO_METRICS)}."
            )
        limits[match[1]] = float(match[2]) * (1000 if match[3] == "s" else 1)
    return limits
