"""How the learning rate moves: linear warm-up, then a cosine to a floor."""

from __future__ import annotations

import math

from latentkv.train.options import TrainOptions


def progress(options: TrainOptions, step: int, elapsed: float) -> float:
    """The fraction of training that is done: by steps, or by seconds of the time limit; from 0 to 1."""
    if options.steps is not None:
        return min(1.0, step / options.steps)
    if options.time_limit is None:
        return 0.0
    return min(1.0, elapsed / (60 * options.time_limit))


def learning_rate(options: TrainOptions, step: int, done: float) -> float:
    """The learning rate of the step with index `step`, when the fraction `done` of training is behind it."""
    return options.lr * warmed_cosine(step, done, warmup=options.warmup, floor=options.min_lr)


def warmed_cosine(step: int, done: float, *, warmup: int, floor: float) -> float:
    """What the highest learning rate is multiplied by: up to 1 in `warmup` steps, then by a cosine down to `floor`."""
    warm = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
