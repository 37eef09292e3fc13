"""The ranges of the numbers that converting, healing, comparing, training and evaluating take, all in one table."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace

from latentkv.errors import LatentKVError

MOST = 2**31 - 1
"""Upper limit of a count that has no other."""


@dataclass(frozen=True)
class Range:
    """Numbers between two limits; NaN and infinities are in none.

    Attributes:
        low: the least.
        high: the greatest; infinity: any finite number.
        whole: whether only whole numbers are meant.
        above: `low` itself is not allowed.
        below: `high` itself is not allowed.
    """

    low: float
    high: float = math.inf
    whole: bool = False
    above: bool = False
    below: bool = False

    def holds(self, value: object) -> bool:
        """Whether a value is in the range; true and false are no numbers, nor are texts."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        if not self.whole and not abs(value) <= sys.float_info.max:  # NaN is neither above nor below anything
            return False
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        """In words, to stand after "must be"."""
        kind = "a whole number" if self.whole else "a number"
        low = f"above {self.low:,}" if self.above else f"of at least {self.low:,}"
        if self.high == math.inf:
            return f"{kind} {low}"
        if self.above or self.below:
            return f"{kind} {low} and {'below' if self.below else 'at most'} {self.high:,}"
        return f"{kind} from {self.low:,} to {self.high:,}"


_COUNT, _COUNT_OR_NONE = Range(1, MOST, whole=True), Range(0, MOST, whole=True)
_POSITIVE, _NOT_NEGATIVE = Range(0, above=True), Range(0)
_FRACTION, _BELOW_ONE = Range(0, 1), Range(0, 1, below=True)

RANGES: dict[str, Range] = {
    "batch_size": _COUNT,
    "batch_tokens": Range(1, 2**26, whole=True),
    "betas": _BELOW_ONE,
    "bias_speed": _NOT_NEGATIVE,
    "depths": Range(0, 100, whole=True),
    "eval_bytes": _COUNT,
    "eval_every": _COUNT_OR_NONE,
    "eval_fraction": _BELOW_ONE,
    "fold": _COUNT,
    "grad_clip": _NOT_NEGATIVE,
    "heads": Range(1, 1024, whole=True),
    "hidden": Range(1, 2**16, whole=True),
    "hidden_weight": _NOT_NEGATIVE,
    "kv_budget": Range(0, 1, above=True),
    "layers": Range(1, 1024, whole=True),
    "length": Range(16, MOST, whole=True),
    "lengths": Range(64, MOST, whole=True),
    "log_every": _COUNT,
    "lora_alpha": _POSITIVE,
    "lora_rank": Range(1, 2**16, whole=True),
    "lr": _POSITIVE,
    "lrs": _POSITIVE,
    "match_steps": _COUNT_OR_NONE,
    "micro_batch": _COUNT,
    "min_lr": _FRACTION,
    "momentum": _BELOW_ONE,
    "mtp_start": _FRACTION,
    "mtp_weight": _NOT_NEGATIVE,
    "rank": _COUNT,
    "rope_dim": Range(2, MOST, whole=True),
    "samples": Range(1, 2**20, whole=True),
    "save_minutes": _POSITIVE,
    "seed": Range(0, 2**63 - 1, whole=True),
    "seeds": Range(1, 20, whole=True),
    "seq_len": _COUNT,
    "sequences": Range(8, 2**20, whole=True),
    "shots": Range(0, 16, whole=True),
    "steps": _COUNT,
    "text_bytes": _COUNT,
    "threads": Range(1, 1024, whole=True),
    "time_limit": _POSITIVE,
    "vocab": Range(259, 2**20, whole=True),  # all bytes and three special tokens
    "warmup": _COUNT_OR_NONE,
    "weight_decay": _NOT_NEGATIVE,
    "window": _COUNT,
}
"""By option, with _ for -; what a command narrows is said where it does."""


def require_range(
    name: str, value: object, error: type[LatentKVError], *, low: int | None = None, high: int | None = None
) -> None:
    """Refuse a number outside the range of its option.

    Args:
        name: of the option, as in `RANGES`.
        value: that was given.
        error: the type that is raised.
        low: the least of this command or model, if it has a limit of its own.
        high: the greatest.

    Raises:
        LatentKVError: of type `error`, naming the option and what it may be.
    """
    allowed = RANGES[name]
    allowed = replace(allowed, low=allowed.low if low is None else low, high=allowed.high if high is None else high)
    if not allowed.holds(value):
        raise error(f"--{name.replace('_', '-')} must be {allowed}, not {_shown(value)}.")


def require_ranges(options: object, error: type[LatentKVError]) -> None:
    """Refuse options, the fields of a dataclass, that are outside of their ranges; None stands for no choice.

    Raises:
        LatentKVError: of type `error`, naming the first such option and what it may be.
    """
    for name, value in vars(options).items():
        if name in RANGES and value is not None:
            for one in value if isinstance(value, tuple) else (value,):
                require_range(name, one, error)


def _shown(value: object) -> str:
    """The value, a long one cut."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**63:
        return "a number of more than 18 digits"
    text = str(value) if isinstance(value, int | float) else repr(value)
    return text if len(text) <= 40 else text[:40] + "..."
