"""One step of the model: some new tokens of some sequences, read through the cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentkv.engine.sequence import Sequence
from latentkv.errors import CheckpointError, StageError
from latentkv.models.batch import Batch, SlotUse
from latentkv.models.decoder import Decoder
from latentkv.models.forms import Form
from latentkv.models.replay import Replay, why_not_recorded
from latentkv.models.transfer import to_host
from latentkv.state import PagedCache

if TYPE_CHECKING:
    from latentkv.parallel import Pipeline

PREFILL_CHUNK = 2048
"""Tokens that one step reads at most: it bounds the memory of a step, whatever the prompt."""

_LOGIT_BYTES = 1 << 26
"""Float32 logits of prompts and scored texts that exist at once."""


class Runner:
    """A decoder and its cache.

    Args:
        decoder: the model, in eval mode; with a pipeline its first stage.
        cache: made of the decoder's specs, on its device.
        pipeline: through the stages of the other ranks; None: there are none.

    Attributes:
        depth: steps that may be under way at once.
    """

    def __init__(self, decoder: Decoder, cache: PagedCache, pipeline: Pipeline | None = None) -> None:
        self.decoder = decoder
        self.cache = cache
        self.depth = 1 if pipeline is None else pipeline.depth
        self._pipeline = pipeline
        self._results: deque[Tensor | StageError] = deque()  # that have come, and nobody has collected
        if pipeline and cache.slots:
            cache.slots.on_copy = pipeline.copy_slot
        self.device = next(decoder.parameters()).device
        self.replay = Replay(decoder.run_layers, cache, why_not_recorded(decoder))

    @contextmanager
    def sequences(self, tokens: SequenceOf[SequenceOf[int]]) -> Generator[list[Sequence]]:
        """Sequences with pages and a slot for their `tokens`, given back at the end whatever happens.

        Raises:
            CacheError: not that many are free.
        """
        needed = [self.cache.pages_for(len(ids)) for ids in tokens]
        pages = self.cache.pool.allocate(sum(needed))
        ends = accumulate(needed)
        sequences = [
            Sequence(index, list(ids), pages[end - count : end])
            for index, (ids, count, end) in enumerate(zip(tokens, needed, ends, strict=True))
        ]
        slots = self.cache.slots
        try:
            if slots:
                for sequence in sequences:
                    sequence.slot = slots.allocate()
            yield sequences
        finally:
            self.cache.pool.free(pages)
            for sequence in sequences:
                if slots and sequence.slot:
                    slots.free(sequence.slot)

    def read(self, sequences: SequenceOf[Sequence], counts: SequenceOf[int]) -> Tensor:
        """Read the next `counts[b]` uncached tokens of each sequence; returns their hidden states [T, D].

        What comes of steps that are under way is kept for those who collect them.

        Raises:
            StageError: another rank could not compute its part.
            RankError: another rank is gone.
        """
        self.submit(sequences, counts)
        if self._pipeline is None:
            result = self._results.pop()
        else:
            while self._pipeline.num_under_way > 1:
                self._results.append(self._arrived(self._pipeline))
            result = self._arrived(self._pipeline)
        return _hidden_of(result)

    @torch.inference_mode()
    def submit(self, sequences: SequenceOf[Sequence], counts: SequenceOf[int]) -> None:
        """Begin to read; the sequences count as read at once.

        Raises:
            RankError: another rank is gone.
        """
        batch = Batch.build(
            [sequence.unread(count) for sequence, count in zip(sequences, counts, strict=True)],
            [s.num_cached for s in sequences],
            [s.pages for s in sequences],
            page_size=self.cache.page_size,
            device=self.device,
            slots=_slot_uses(sequences, counts),
        )
        # Drafts are checked in the form in which tokens are decoded one by one: they give the same bits.
        form: Form | None = "absorbed" if any(sequence.draft for sequence in sequences) else None
        if self._pipeline is None:
            hidden = self.replay.run(batch, self.decoder.inputs, form=form)
        else:
            x = self.decoder.embedded(batch)
            with self._pipeline.leading(batch, form, x):
                hidden = self.replay.run(batch, lambda batch: (x, self.decoder.rotary(batch.positions)), form=form)
        for sequence, count in zip(sequences, counts, strict=True):
            if sequence.slot:
                sequence.slot.num_tokens = sequence.num_cached + _committed(sequence, count)
            sequence.num_cached += count
        if self._pipeline is None:
            self._results.append(hidden)
        else:
            self._pipeline.submit(batch, form, hidden)

    def collect(self) -> Tensor:
        """The hidden states [T, D] of the step that was submitted first and is not collected yet.

        Raises:
            StageError: another rank could not compute its part of it.
            RankError: another rank is gone.
        """
        if self._pipeline is None or self._results:
            return _hidden_of(self._results.popleft())
        return _hidden_of(self._arrived(self._pipeline))

    def close(self) -> None:
        """Let the other ranks end, where there are any.

        Raises:
            RankError: one of them is gone.
        """
        if self._pipeline:
            self._pipeline.close()

    def _arrived(self, pipeline: Pipeline) -> Tensor | StageError:
        try:
            return pipeline.collect()
        except StageError as error:
            return error

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [T, V] of `hidden` [T, D], where the model runs.

        Raises:
            CheckpointError: they are not finite, so nothing could be chosen by them.
        """
        return _require_finite(self.decoder.logits(hidden), hidden.dtype)

    @torch.inference_mode()
    def logits_on_host(self, hidden: Tensor) -> Tensor:
        """The same on the host, where tokens are chosen: all that a step brings back from a GPU, in one transfer."""
        return _require_finite(to_host(self.decoder.logits(hidden)), hidden.dtype)

    def logits_in_parts(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Which rows, and their logits: so few at a time that they need bounded memory."""
        size = max(1, _LOGIT_BYTES // (4 * self.decoder.config.vocab_size))
        for start in range(0, len(hidden), size):
            rows = slice(start, min(start + size, len(hidden)))
            yield rows, self.logits(hidden[rows])


def _hidden_of(result: Tensor | StageError) -> Tensor:
    if isinstance(result, StageError):
        raise result
    return result


def _slot_uses(sequences: SequenceOf[Sequence], counts: SequenceOf[int]) -> list[SlotUse]:
    """What reading so many tokens of each does with their recurrent states; empty where there are none."""
    return [
        SlotUse(slot.index, sequence.num_cached - slot.num_tokens, _committed(sequence, count))
        for sequence, count in zip(sequences, counts, strict=True)
        if (slot := sequence.slot)
    ]


def _committed(sequence: Sequence, count: int) -> int:
    """Of the next `count` tokens, those that are no draft."""
    return min(count, sequence.num_uncached)


def _require_finite(logits: Tensor, dtype: torch.dtype) -> Tensor:
    if not bool(logits.amax(-1).isfinite().all()):
        raise CheckpointError(
            "The model computed logits that are not finite: its weights hold NaN or infinity, "
            f"or they overflow in {dtype}; check the checkpoint, or load it with dtype='fp32'."
        )
    return logits


def share_out(sequences: SequenceOf[Sequence], limit: int) -> tuple[list[Sequence], list[int]]:
    """Which sequences read how many tokens when a step reads at most `limit`: the first ones as many as they can."""
    chosen: list[Sequence] = []
    counts: list[int] = []
    for sequence in sequences:
        count = min(sequence.num_uncached, limit - sum(counts))
        if count > 0:
            chosen.append(sequence)
            counts.append(count)
    return chosen, counts
