"""Drafts by a model's own multi-token-prediction module."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from latentkv.engine.drafts import Wish
from latentkv.engine.sequence import Sequence
from latentkv.errors import CacheError
from latentkv.models.batch import Batch
from latentkv.models.decoder import Decoder
from latentkv.models.replay import Replay, why_not_recorded
from latentkv.models.transfer import take_rows, to_device, to_host
from latentkv.state import PagedCache


@dataclass
class _Reading:
    """How far the module has read a sequence.

    Attributes:
        num_cached: the module's cache holds the tokens before this one; 0 until it has read any.
        states: hidden states that it has not read yet, the first of the token before that one.
    """

    num_cached: int = 0
    states: list[Tensor] = field(default_factory=list[Tensor])


class MTPDrafter:
    """Drafts with the first MTP module of a model (DeepSeek-V3, arXiv 2412.19437, section 2.2).

    The module is a layer that reads the model's hidden state of a token with the embedding of the next, and predicts
    the one after that. It has cached latents of its own, in the same pages: a token's lie in the token's own slot, and
    depend on the tokens up to it alone, so that shared pages serve whoever shares them. (The first token of a text has
    none: no state comes before it.)

    For a draft of several tokens the module reads its own output in place of the model's state, as SGLang and vLLM have
    it. What it caches on the way is overwritten once the true state is known.

    The module reads what the model has read as late as it can: before a draft, and when a page is full. A sequence that
    drafts nothing costs it one step a page.

    Args:
        decoder: with an MTP module, in eval mode.
        cache: with a layer for the module (`ModelConfig.specs(..., mtp=)`). It keeps the state of each full page's last
            token, too: whoever shares the page, or has it back from a file, goes on from there.

    Raises:
        CacheError: the cache has no such layer.
    """

    def __init__(self, decoder: Decoder, cache: PagedCache) -> None:
        self._decoder = decoder
        self._cache = cache
        self._replay = Replay(decoder.run_mtp, cache, why_not_recorded(decoder))
        last_states = cache.view(-1).last_states
        if last_states is None:
            raise CacheError("drafts by MTP need a cache with a layer for the module: give ModelConfig.specs mtp=dtype")
        self._last_states = last_states
        self._readings: dict[Sequence, _Reading] = {}

    @torch.inference_mode()
    def propose(self, wishes: SequenceOf[Wish], seconds: float) -> list[list[int]]:
        """See `Drafter`."""
        for wish in wishes:
            self._keep(wish.sequence, wish.hidden)
        due = [wish for wish in wishes if wish.most or self._has_unread_page(wish.sequence)]
        drafts: dict[Sequence, list[int]] = {wish.sequence: [] for wish in wishes}
        if due:
            ends, hidden = self._catch_up([wish.sequence for wish in due])
            asked = [i for i, wish in enumerate(due) if wish.most]
            self._draft([due[i] for i in asked], hidden[[ends[i] - 1 for i in asked]], drafts)
        return list(drafts.values())

    def forget(self, sequence: Sequence) -> None:
        """See `Drafter`."""
        self._readings.pop(sequence, None)

    def _keep(self, sequence: Sequence, hidden: Tensor) -> None:
        """Note the states [n, D] of tokens just read."""
        reading = self._readings.setdefault(sequence, _Reading())
        size, end = self._cache.page_size, sequence.num_cached
        start = end - len(hidden)
        if reading.num_cached == 0:
            reading.num_cached = max(start, 1)
            if start > 0:  # it begins with pages that are known already
                reading.states.append(self._last_states[sequence.pages[start // size - 1], None])
        reading.states.append(hidden.clone())
        filled = range(start // size, end // size)
        if filled:
            rows = [(page + 1) * size - 1 - start for page in filled]
            pages = torch.tensor([sequence.pages[page] for page in filled])
            self._last_states.index_copy_(0, to_device(pages, hidden.device), take_rows(hidden, rows))

    def _has_unread_page(self, sequence: Sequence) -> bool:
        full = sequence.num_cached // self._cache.page_size * self._cache.page_size
        return self._readings[sequence].num_cached < full

    def _catch_up(self, sequences: list[Sequence]) -> tuple[list[int], Tensor]:
        """Read all tokens whose state before them is known: where each sequence's rows end, and the output [T, D]."""
        counts = [self._num_readable(sequence) for sequence in sequences]
        readings = [self._readings[sequence] for sequence in sequences]
        states: list[Tensor] = []
        for reading, count in zip(readings, counts, strict=True):
            known = torch.cat(reading.states)
            states.append(known[:count])
            reading.states = [known[count:].clone()]
        starts = [reading.num_cached for reading in readings]
        tokens = [s.tokens[start : start + n] for s, start, n in zip(sequences, starts, counts, strict=True)]
        hidden = self._read(sequences, tokens, starts, torch.cat(states))
        for reading, count in zip(readings, counts, strict=True):
            reading.num_cached += count
        return list(accumulate(counts)), hidden

    def _num_readable(self, sequence: Sequence) -> int:
        """Tokens that come after known states, are known themselves, and have a slot: one at least where it is due."""
        slots = len(sequence.pages) * self._cache.page_size
        return min(sequence.num_cached + 1, len(sequence.tokens), slots) - self._readings[sequence].num_cached

    def _draft(self, wishes: list[Wish], hidden: Tensor, drafts: dict[Sequence, list[int]]) -> None:
        """Fill `drafts`, going on from the module's output [B, D] for each sequence's newest token."""
        while wishes:
            for wish, logits in zip(wishes, to_host(self._decoder.logits(hidden)), strict=True):
                draft = drafts[wish.sequence]
                draft.append(wish.choose(draft, logits))
            rows = [i for i, wish in enumerate(wishes) if len(drafts[wish.sequence]) < wish.most]
            wishes = [wishes[i] for i in rows]
            if wishes:
                sequences = [wish.sequence for wish in wishes]
                tokens = [drafts[sequence][-1:] for sequence in sequences]
                starts = [len(sequence.tokens) + len(drafts[sequence]) - 1 for sequence in sequences]
                hidden = self._read(sequences, tokens, starts, take_rows(hidden, rows))

    def _read(self, sequences: list[Sequence], tokens: list[list[int]], starts: list[int], states: Tensor) -> Tensor:
        """The module's output [T, D] for `tokens` at `starts`, after the `states` [T, D] of the tokens before them."""
        batch = Batch.build(
            tokens,
            starts,
            [sequence.pages for sequence in sequences],
            page_size=self._cache.page_size,
            device=states.device,
            kv_start=1,
        )
        hidden = self._replay.hidden(batch, lambda batch: self._decoder.mtp_inputs(states, batch))
        if hidden is None:
            hidden = self._decoder.run_mtp(*self._decoder.mtp_inputs(states, batch), batch, self._cache)
        return hidden
