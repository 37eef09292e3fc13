"""How an activation is kept from growing: a number, and what it bounds."""

from __future__ import annotations

from typing import NamedTuple


class SwigluLimit(NamedTuple):
    """A bound of both factors of SwiGLU: `up` lies within +-value, and the other factor is at most it.

    Attributes:
        value: above 0.
        bounds_gate: the gate itself is bounded, before silu (GLM-5.3-Flash, DeepSeek-V4); else what silu gives
            (Ling-3.0-flash).
    """

    value: float
    bounds_gate: bool = False
