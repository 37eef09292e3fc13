"""When requests arrive where nobody waits for the one before."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random


def arrivals(rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """Seconds from the start at which requests arrive, without end.

    The gaps between them are drawn from a gamma distribution of mean 1 / rate.

    Args:
        rate: requests a second, above 0.
        burstiness: 1 is a Poisson process; less comes in bursts, more comes evenly; above 0.
        seed: same seed, same arrivals.
    """
    random = Random(f"{seed} arrivals")
    at = 0.0
    while True:
        at += random.gammavariate(burstiness, 1 / (rate * burstiness))
        yield at
