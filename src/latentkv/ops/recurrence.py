"""What recurrent layers share: slots that hold a sequence's state and its drafts, and token by token through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from latentkv.checks import require, require_integers, require_shape
from latentkv.errors import OpError

Memory = tuple[Tensor, ...]
Step = Callable[[Memory, Memory, int | None], tuple[Tensor, Memory]]
"""(kept, what is read of a token, its number among the new rows or None where it has waited) -> (what the token gives,
kept after it); what it gives is asked of new rows alone."""


def require_uses(rows: int, **indices: Tensor) -> None:
    """Raise `OpError` unless `q_start`, `stop`, `slot_ids`, `pending` and `committed` are of the right shapes."""
    sequences = indices["q_start"].shape[0] - 1
    sizes = {"q_start": sequences + 1, "stop": rows}
    for name, numbers in indices.items():
        require_integers(name, numbers)
        require_shape(name, numbers, (sizes.get(name, sequences),))


def require_memory(**memory: Tensor) -> None:
    """Raise `OpError` unless all of it is float32 and contiguous."""
    for name, tensor in memory.items():
        require(tensor.dtype is torch.float32, f"{name} must be float32, not {tensor.dtype}: its errors add up")
        require(tensor.is_contiguous(), f"{name} must be contiguous: it is written in place")


def run_in_slots(
    step: Step,
    reads: Memory,
    kept: Memory,
    waiting: Memory,
    out: Tensor,
    indices: Sequence[Tensor],
) -> Tensor:
    """Each sequence token by token, from the state in its slot on.

    Token by token from the first step on: torch's exponentials differ in a bit with where in a tensor a number lies.

    Args:
        step: one token's.
        reads: what the recurrence reads of the T new rows, each [T, ...].
        kept: what slots keep, each [S, ...], written in place.
        waiting: where drafts wait, each [S, K, ...], written in place.
        out: [T, ...], filled.
        indices: q_start, stop, slot_ids, pending and committed.

    Returns:
        out.

    Raises:
        OpError: a number names what there is not.
    """
    bounds, begun, slots, accepted, committed = (numbers.tolist() for numbers in indices)
    unfit = _first_unfit(len(out), waiting[0].shape[:2], bounds, slots, accepted, committed)
    if unfit is not None:
        raise_unfit(unfit)
    for b, slot in enumerate(slots):
        first, last = bounds[b], bounds[b + 1]
        begins = last > first and begun[first] == 1
        before = 0 if begins else accepted[b]
        stored = before + committed[b]
        old = [tensor[slot, :before] for tensor in waiting]
        rows = [
            torch.cat([o, r[first:last].to(o.dtype).view(-1, *o.shape[1:])]) for o, r in zip(old, reads, strict=True)
        ]
        now = tuple(torch.zeros_like(tensor[slot]) if begins else tensor[slot].clone() for tensor in kept)
        for t in range(len(rows[0]) + 1):
            if t == stored:
                for tensor, value in zip(kept, now, strict=True):
                    tensor[slot] = value
            if t < len(rows[0]):
                new = None if t < before else first + t - before
                given, now = step(now, tuple(row[t : t + 1] for row in rows), new)
                if new is not None:
                    out[new] = given
        for tensor, row in zip(waiting, rows, strict=True):
            tensor[slot, : len(row) - stored] = row[stored:]
    return out


def raise_unfit(sequence: int) -> None:
    """Raise the `OpError` for a sequence whose numbers do not fit."""
    raise OpError(
        f"sequence {sequence} has rows, a slot, pending or committed rows that there are not, or a slot that another "
        "sequence has: q_start, slot_ids, pending and committed must fit the rows and the state"
    )


def _first_unfit(
    rows: int, room: Sequence[int], bounds: list[int], slots: list[int], pending: list[int], committed: list[int]
) -> int | None:
    """The first sequence whose numbers name what there is not, or a slot that another has."""
    num_slots, most = room
    for b, slot in enumerate(slots):
        first, last = bounds[b], bounds[b + 1]
        fits = (
            0 <= first <= last <= rows
            and 0 <= slot < num_slots
            and 0 <= pending[b] <= most
            and 0 <= committed[b] <= last - first <= committed[b] + most
        )
        if not fits or slot in slots[:b]:
            return b
    return None
