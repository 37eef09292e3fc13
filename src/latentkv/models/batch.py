"""`Batch`: the tensors of one step, ragged over sequences. The models below read it; the engine above builds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from latentkv.models.transfer import to_device


class SlotUse(NamedTuple):
    """What a step does with a sequence's recurrent state; `Batch` tells what each is."""

    slot: int
    pending: int
    committed: int


@dataclass(frozen=True)
class Batch:
    """New tokens of B sequences, concatenated (T in all), and where their past lies in the paged cache.

    Attributes:
        input_ids: [T] int64.
        positions: [T] int64, index of each new token in its sequence.
        q_start: [B + 1] int32; sequence b owns rows q_start[b] : q_start[b + 1].
        block_table: [B, M] int32 page numbers; entries past a sequence's pages may hold anything.
        slots: [T] int64 cache slot (page * page_size + offset) that each new token is written to.
        stop: [T] int32; row t reads the cached tokens s < stop[t] of its sequence (its own token included).
        query_lens: new tokens of each sequence, known to the host.
        kv_lens: cached tokens of each sequence after this step's are written, known to the host; of a step that is to
            be run again with longer sequences, the most that they may hold.
        kv_start: cached tokens before this one, which are none of the new ones, are not read; known to the host.
        start: [T] int32, `kv_start` for each row; None where it is 0.
        slot_ids: [B] int32, where each sequence's recurrent state lies; None where no layer is recurrent.
        pending: [B] int32, likewise; so many of the tokens that wait in the slot come before the new ones.
        committed: [B] int32, likewise; so many of the new tokens, one at least, change the state in the slot.

    A recurrent layer takes the first `pending` waiting tokens of a slot into its state, then the first `committed` new
    ones, and stores it; the other new tokens, which are a draft, go on from there without a trace but that they wait in
    the slot from now on, in place of those before. The first row of a sequence has stop = 1 exactly if the sequence
    begins with it: then its state is zero, whatever lies in the slot, and pending is 0. A recorded step reads all of
    this from the tensors.
    """

    input_ids: Tensor
    positions: Tensor
    q_start: Tensor
    block_table: Tensor
    slots: Tensor
    stop: Tensor
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    kv_start: int = 0
    start: Tensor | None = None
    slot_ids: Tensor | None = None
    pending: Tensor | None = None
    committed: Tensor | None = None

    @classmethod
    def build(
        cls,
        tokens: Sequence[Sequence[int]],
        starts: Sequence[int],
        pages: Sequence[Sequence[int]],
        *,
        page_size: int,
        device: torch.device | str = "cpu",
        kv_start: int = 0,
        slots: Sequence[SlotUse] | None = None,
    ) -> Batch:
        """Lay out one step.

        Args:
            tokens: the new tokens of each sequence (at least one each).
            starts: how many tokens of each sequence the cache holds already.
            pages: the pages of each sequence, enough for its past and its new tokens.
            page_size: tokens a page.
            device: where the model runs.
            kv_start: cached tokens before this one are not read.
            slots: of each sequence, where a layer is recurrent.
        """
        query_lens = tuple(len(new) for new in tokens)
        kv_lens = tuple(start + n for start, n in zip(starts, query_lens, strict=True))
        # Lists, not tensors: a decode step has few tokens, and a small tensor operation costs more than all of them.
        positions = [p for start, end in zip(starts, kv_lens, strict=True) for p in range(start, end)]
        written = [
            owned[p // page_size] * page_size + p % page_size
            for owned, start, end in zip(pages, starts, kv_lens, strict=True)
            for p in range(start, end)
        ]
        width = max(len(owned) for owned in pages)
        table = torch.tensor([[*owned, *[0] * (width - len(owned))] for owned in pages], dtype=torch.int32)

        def on_device(numbers: Sequence[int], dtype: torch.dtype) -> Tensor:
            return to_device(torch.tensor(numbers, dtype=dtype), device)

        return cls(
            input_ids=on_device([t for new in tokens for t in new], torch.int64),
            positions=on_device(positions, torch.int64),
            q_start=on_device([0, *accumulate(query_lens)], torch.int32),
            block_table=to_device(table, device),
            slots=on_device(written, torch.int64),
            stop=on_device([p + 1 for p in positions], torch.int32),
            query_lens=query_lens,
            kv_lens=kv_lens,
            kv_start=kv_start,
            start=torch.full((len(positions),), kv_start, dtype=torch.int32, device=device) if kv_start else None,
            slot_ids=on_device([use.slot for use in slots], torch.int32) if slots else None,
            pending=on_device([use.pending for use in slots], torch.int32) if slots else None,
            committed=on_device([use.committed for use in slots], torch.int32) if slots else None,
        )

    def cut(self, length: int) -> Batch:
        """The same rows; a sequence that grows past `length` cached tokens in this step is two: up to it, past it.

        It is for layers that attend: a recurrent layer's state is not cut.
        """
        pieces: list[tuple[int, int, int]] = []  # sequence, new tokens, cached tokens after them
        for b, (new, end) in enumerate(zip(self.query_lens, self.kv_lens, strict=True)):
            within = min(max(length - (end - new), 0), new)
            pieces += [piece for piece in ((b, within, end - new + within), (b, new - within, end)) if piece[1]]
        if len(pieces) == len(self.query_lens):
            return self
        owners, lens, ends = zip(*pieces, strict=True)
        bounds = torch.tensor([0, *accumulate(lens)], dtype=torch.int32)
        return replace(
            self,
            q_start=to_device(bounds, self.q_start.device),
            block_table=self.block_table[to_device(torch.tensor(owners), self.block_table.device)],
            query_lens=lens,
            kv_lens=ends,
            slot_ids=None,
            pending=None,
            committed=None,
        )

    def part(self, first: int, last: int) -> tuple[Batch, slice]:
        """Sequences first .. last - 1 as a batch of their own, and the rows of T that they own."""
        begin = sum(self.query_lens[:first])
        rows = slice(begin, begin + sum(self.query_lens[first:last]))
        part = Batch(
            input_ids=self.input_ids[rows],
            positions=self.positions[rows],
            q_start=self.q_start[first : last + 1] - self.q_start[first],
            block_table=self.block_table[first:last],
            slots=self.slots[rows],
            stop=self.stop[rows],
            query_lens=self.query_lens[first:last],
            kv_lens=self.kv_lens[first:last],
            kv_start=self.kv_start,
            start=None if self.start is None else self.start[rows],
            slot_ids=None if self.slot_ids is None else self.slot_ids[first:last],
            pending=None if self.pending is None else self.pending[first:last],
            committed=None if self.committed is None else self.committed[first:last],
        )
        return part, rows
