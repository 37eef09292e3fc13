"""Reading text instead of writing it: the logits of a sequence, and what each of its tokens costs in nats."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from latentkv.engine.runner import PREFILL_CHUNK, Runner, share_out
from latentkv.engine.sequence import Sequence


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `stop` of a text are read together; those from `scored` on are scored."""

    start: int
    stop: int
    scored: int


@dataclass(frozen=True)
class TextScore:
    """How a text of T tokens is predicted.

    Attributes:
        nats: summed -log p of all tokens but the first.
        likeliest: int64 [T - 1], the likeliest token in the place of each.
    """

    nats: float
    likeliest: Tensor


def windows(total: int, context: int) -> list[Window]:
    """Windows of `context` tokens at half stride over `total` tokens; each token but the first is scored once."""
    stride = max(1, context // 2)
    result = [Window(0, min(context, total), 1)]
    while result[-1].stop < total:
        start = result[-1].start + stride
        result.append(Window(start, min(start + context, total), result[-1].stop))
    return result


def score_text(runner: Runner, tokens: SequenceOf[int], context: int) -> TextScore:
    """How all tokens but the first are predicted, each from what its window shows before it.

    Windows are read together as far as one step's tokens and the free pages allow.

    Raises:
        CacheError: not even one window fits into the free pages.
    """
    nats, likeliest = 0.0, torch.empty(len(tokens) - 1, dtype=torch.int64)
    for group in _groups(windows(len(tokens), context), runner):
        # A window's last token is only scored: nothing of it need be read.
        with runner.sequences([tokens[window.start : window.stop - 1] for window in group]) as sequences:
            for sequence, first, hidden in _read_through(runner, sequences):
                window = group[sequence.index]
                start = window.start + first
                unscored = max(0, window.scored - 1 - start)
                scored = slice(start + unscored, start + len(hidden))
                targets = torch.tensor(tokens[scored.start + 1 : scored.stop + 1], dtype=torch.int64)
                nats += _score(runner, hidden[unscored:], targets.to(hidden.device), likeliest[scored])
    return TextScore(nats, likeliest)


def sequence_logits(runner: Runner, tokens: SequenceOf[int]) -> Tensor:
    """Float32 logits [T, V] after each of `tokens`.

    Raises:
        CacheError: they do not fit into the free pages.
    """
    with runner.sequences([tokens]) as sequences:
        return torch.cat([runner.logits(hidden) for _, _, hidden in _read_through(runner, sequences)])


def hidden_states(runner: Runner, tokens: SequenceOf[int]) -> Tensor:
    """The states [T, D] after each of `tokens`, of which `runner.logits` makes logits.

    Raises:
        CacheError: they do not fit into the free pages.
    """
    with runner.sequences([tokens]) as sequences:
        return torch.cat([hidden.clone() for _, _, hidden in _read_through(runner, sequences)])


def _groups(all_windows: list[Window], runner: Runner) -> Iterator[list[Window]]:
    """Cut the windows into groups that are read together, at least one window each."""
    longest = max(window.stop - window.start for window in all_windows)
    size = max(1, min(PREFILL_CHUNK // longest, runner.cache.fitting_sequences(longest)))
    for start in range(0, len(all_windows), size):
        yield all_windows[start : start + size]


def _read_through(runner: Runner, sequences: list[Sequence]) -> Iterator[tuple[Sequence, int, Tensor]]:
    """Read `sequences` to their ends in bounded steps; yields a sequence, a position and the states from there on."""
    while unread := [sequence for sequence in sequences if sequence.num_uncached]:
        chosen, counts = share_out(unread, PREFILL_CHUNK)
        positions = [sequence.num_cached for sequence in chosen]
        hidden = runner.read(chosen, counts)
        yield from zip(chosen, positions, hidden.split(counts), strict=True)


def _score(runner: Runner, hidden: Tensor, targets: Tensor, likeliest: Tensor) -> float:
    """Summed -log p of `targets` [T] under the logits of `hidden` [T, D], a bounded block of logits at a time."""
    nats = 0.0
    for rows, logits in runner.logits_in_parts(hidden):
        nats += float(functional.cross_entropy(logits, targets[rows], reduction="none").double().sum())
        likeliest[rows] = logits.argmax(-1).to(likeliest.device)
    return nats
