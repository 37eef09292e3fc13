"""`measure_hops`: what messages from rank to rank really take."""

from __future__ import annotations

import time
from statistics import median

import torch

from latentkv.parallel.messages import Kind, Message
from latentkv.parallel.ranks import Ranks

_LARGE = 4 << 20
_ROUNDS = 50


def measure_hops(ranks: Ranks, num_bytes: int) -> tuple[float, float]:
    """Seconds of one hop of a message of so many bytes, and bytes a second of large ones; medians of whole rounds.

    Args:
        ranks: all of them call this.
        num_bytes: of a token's hidden state.
    """
    small = _hop(ranks, num_bytes)
    large = _hop(ranks, _LARGE)
    return small, _LARGE / max(large - small, 1e-9)


def _hop(ranks: Ranks, num_bytes: int) -> float:
    message = Message(Kind.STEP, x=torch.zeros(num_bytes, dtype=torch.uint8))
    times: list[float] = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        if ranks.is_driver:
            ranks.ring.send(message)
        arrived = ranks.ring.receive()
        if not ranks.is_driver:
            ranks.ring.send(arrived)
        times.append((time.perf_counter() - began) / ranks.size)
    ranks.ring.flush()
    return median(times)
