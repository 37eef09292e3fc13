"""What a comparison has found so far: every number that is printed, drawn or kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from latentkv.bench.environment import Environment
from latentkv.compare.arms import Arm
from latentkv.compare.options import SWEEP_SEED, CompareOptions
from latentkv.compare.sizes import BASELINE
from latentkv.compare.statistics import Difference, Spread, paired_difference, spread
from latentkv.plan import count_parameters
from latentkv.state import bytes_per_token


@dataclass(frozen=True)
class Speed:
    """Of decoding one sequence, weights and cache in bf16.

    Attributes:
        tokens_per_second: median of the rounds.
        spread: interquartile range over the median.
    """

    tokens_per_second: float
    spread: float


@dataclass(frozen=True)
class ArmReport:
    """What is known of one attention.

    Attributes:
        name: of the arm.
        parameters: of the whole model.
        width: of its feed-forward layer.
        cached_numbers: a token, all layers.
        cached_bytes: of these in bf16, as the cache stores them.
        sweep: held-out loss of the short runs by learning rate; None: that run diverged.
        rate: chosen; None until all of them are done.
        rate_at_edge: whether the chosen one is the smallest or the largest that was tried.
        losses: held-out loss in nats a token by seed.
        bits_per_byte: of the same runs.
        loss: of all seeds; None until there is one.
        bits: bits a byte of all seeds; None until there is one.
        difference: of the loss to MHA's with the same seeds; None of MHA itself.
        decode: speed of the trained model; None where it was not measured.
    """

    name: str
    parameters: int
    width: int
    cached_numbers: int
    cached_bytes: int
    sweep: Mapping[float, float | None]
    rate: float | None
    rate_at_edge: bool
    losses: Mapping[int, float]
    bits_per_byte: Mapping[int, float]
    loss: Spread | None
    bits: Spread | None
    difference: Difference | None
    decode: Speed | None


@dataclass(frozen=True)
class Pair:
    """Two arms that cache the same number of bytes: the loss of `first` (MLA) less that of `second`."""

    first: str
    second: str
    difference: Difference


@dataclass(frozen=True)
class Report:
    """A comparison.

    Attributes:
        command: that asked for it.
        environment: where.
        options: how.
        training: documents, bytes and tokens that there are to train on, and tokens that a full run takes.
        held_out: names, bytes and tokens of what is measured on.
        finished: runs.
        total: runs, when all are finished.
        minutes: of training, all runs.
        arms: one each.
        same_cache: each MLA arm beside one with keys and values that caches as much.
    """

    command: Sequence[str]
    environment: Environment
    options: CompareOptions
    training: Mapping[str, int]
    held_out: Mapping[str, Any]
    finished: int
    total: int
    minutes: float
    arms: Sequence[ArmReport]
    same_cache: Sequence[Pair]

    def as_json(self) -> dict[str, Any]:
        """For compare.json."""
        return asdict(self) | {"sweep_seed": SWEEP_SEED, "sweep_steps": self.options.sweep_steps}


def choose_rate(sweep: Mapping[float, float | None], rates: Sequence[float]) -> float | None:
    """The learning rate with the least loss; None while runs are missing, or when all diverged."""
    losses = {rate: sweep[rate] for rate in rates if rate in sweep}
    if len(losses) < len(set(rates)):
        return None
    found = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(found, key=lambda rate: found[rate]) if found else None


def report_arm(
    arm: Arm,
    options: CompareOptions,
    sweep: Mapping[float, float | None],
    rate: float | None,
    losses: Mapping[int, float],
    bits_per_byte: Mapping[int, float],
    baseline: Mapping[int, float],
    decode: Speed | None,
) -> ArmReport:
    """One arm's part of the report.

    Args:
        arm: which.
        options: of the comparison.
        sweep: loss by learning rate, as far as it is known.
        rate: chosen.
        losses: by seed, as far as they are known.
        bits_per_byte: by seed.
        baseline: MHA's losses by seed.
        decode: its speed.
    """
    width = options.width(arm)
    config = arm.config(options.sizes, width)
    return ArmReport(
        name=arm.name,
        parameters=count_parameters(config),
        width=width,
        cached_numbers=arm.cached_numbers(options.sizes),
        cached_bytes=bytes_per_token(config.specs("bf16")),
        sweep=dict(sweep),
        rate=rate,
        rate_at_edge=len(options.rates) > 1 and rate in (min(options.rates), max(options.rates)),
        losses=dict(losses),
        bits_per_byte=dict(bits_per_byte),
        loss=spread(list(losses.values())) if losses else None,
        bits=spread(list(bits_per_byte.values())) if bits_per_byte else None,
        difference=None if arm.name == BASELINE else paired_difference(losses, baseline),
        decode=decode,
    )


def same_cache_pairs(arms: Sequence[Arm], reports: Mapping[str, ArmReport]) -> list[Pair]:
    """Each MLA arm beside each other one with the same bytes in the cache."""
    pairs: list[Pair] = []
    for latent in (arm.name for arm in arms if arm.rank is not None):
        for other in (arm.name for arm in arms if arm.rank is None):
            if reports[latent].cached_bytes == reports[other].cached_bytes:
                difference = paired_difference(reports[latent].losses, reports[other].losses)
                if difference is not None:
                    pairs.append(Pair(latent, other, difference))
    return pairs
