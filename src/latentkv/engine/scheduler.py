"""`Scheduler`: which sequences read how many tokens in the next step, and who holds the cache's pages meanwhile."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from latentkv.engine.counters import Counters
from latentkv.engine.offload import Offload
from latentkv.engine.sequence import Sequence
from latentkv.engine.snapshots import EVERY, Snapshots
from latentkv.state import KnownPage, PagedCache, PageStore, PrefixIndex

MAX_RUNNING = 256
"""Sequences that have pages at once."""

FAIR_SHARE = 128
"""Prompt tokens that a step should at least give to a prompt: smaller pieces would cost more than fairness is worth."""

MIN_PROMPT_TOKENS = 8
"""Of a step, that prompts get however many others decode."""

Share = tuple[Sequence, int]


@dataclass
class _Sharing:
    """What a sequence shares with others.

    Attributes:
        salt: whose prefixes it shares; texts of different salts share nothing. None: it shares with nobody.
        known: its first pages that others can find, as they find them.
    """

    salt: str | None
    known: list[KnownPage] = field(default_factory=list[KnownPage])


class Scheduler:
    """Hands out a step's tokens and the cache's pages and slots.

    Every running sequence that decodes gets its token; what is left of a step's budget is shared equally among the
    oldest prompts, so that neither a long prompt nor a stream of short ones holds up the others. A sequence waits until
    all its tokens' pages are free (and a slot, where layers are recurrent), first come first served. It takes further
    pages as it grows; where none is free, the youngest sequence gives all of its back and is read again later: the
    oldest always goes on, so everything ends.
    One whose first pages are stored has its pages filled from there, beside the steps, before it takes part in them.

    Args:
        cache: whose pages are handed out.
        max_running: sequences that have pages at once.
        store: where pages are looked for that are not in memory, and go; it is closed with this.
        forget: told of every sequence that has given its pages back.
        snapshot_every: pages of a prompt after which the state of recurrent layers is kept to go on from.

    Attributes:
        running: sequences with pages, oldest first.
        waiting: those without, oldest first.
        prefixes: pages that can be shared.
        counters: what has been done.
    """

    def __init__(
        self,
        cache: PagedCache,
        *,
        max_running: int = MAX_RUNNING,
        store: PageStore | None = None,
        forget: Callable[[Sequence], None] | None = None,
        snapshot_every: int = EVERY,
    ) -> None:
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.counters = Counters()
        self.prefixes = PrefixIndex(cache.pool, cache.page_size, cache.slots)
        self._snapshots = Snapshots(self.prefixes, cache.page_size, snapshot_every) if cache.slots else None
        self._cache = cache
        self._max_running = max_running
        self._forget = forget
        self._sharing: dict[Sequence, _Sharing] = {}
        self._offload = Offload(store, self.prefixes, self.counters) if store else None

    def add(self, sequence: Sequence, salt: str | None = "") -> None:
        """Let a sequence without pages wait for them; it shares the prefixes of `salt` (None: with nobody)."""
        self._sharing[sequence] = _Sharing(salt)
        insort(self.waiting, sequence, key=_age)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, and give back its pages."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        if self._offload and self._snapshots:
            self._offload.save_snapshots(sequence, self._sharing[sequence].known)
        self._give_back(sequence)
        del self._sharing[sequence]

    def plan(self, budget: int, *, groups: int = 1, busy: Collection[Sequence] = ()) -> list[Share]:
        """Who reads how many tokens in a step of `budget` tokens, those that decode first; empty: nobody can.

        Every sequence that decodes takes part, even where the budget is smaller; a prompt moves on in every step.
        Drafts are read where no prompt waits for the time that they take.

        Args:
            budget: tokens.
            groups: so many steps can be under way at once: those that decode are shared out among them.
            busy: sequences in steps under way that cannot take part in another one, though they have unread tokens.
        """
        self._take_loaded()
        self._admit()
        of_group = -(-sum(sequence.num_uncached <= 1 for sequence in self.running) // groups)
        decoding = [sequence for sequence in self._with_room() if sequence.decodes and sequence not in busy][:of_group]
        prompts = [
            sequence
            for sequence in self.running
            if sequence.num_uncached > 1 and sequence not in busy and not self._is_loading(sequence)
        ]
        left = max(budget - len(decoding), min(budget, MIN_PROMPT_TOKENS))
        for sequence in decoding:
            sequence.draft = sequence.draft[: 0 if prompts else left]
            left -= len(sequence.draft)
        most = {sequence: self._most_read(sequence) for sequence in prompts}
        least = accumulate(min(most[sequence], FAIR_SHARE) for sequence in prompts)
        prompts = prompts[: max(sum(tokens <= left for tokens in least), 1)]
        shares: dict[Sequence, int] = {}
        for done, sequence in enumerate(sorted(prompts, key=lambda each: most[each])):
            shares[sequence] = min(most[sequence], -(-left // (len(prompts) - done)))
            left -= shares[sequence]
        decodes = [(sequence, 1 + len(sequence.draft)) for sequence in decoding]
        return decodes + [(sequence, shares[sequence]) for sequence in prompts if shares[sequence]]

    @property
    def may_draft(self) -> bool:
        """Whether no prompt waits for the time that drafts take."""
        return all(sequence.num_uncached <= 1 for sequence in self.running)

    def room_for_draft(self, sequence: Sequence, most: int) -> int:
        """How many tokens, at most so many, can be drafted after the newest one of a running sequence.

        It gets the pages for them as far as there are free ones.
        """
        missing = self._cache.pages_for(sequence.num_cached + 1 + most) - len(sequence.pages)
        if missing > 0:
            sequence.pages += self._cache.pool.allocate(min(missing, self._cache.pool.free_pages))
        room = len(sequence.pages) * self._cache.page_size - sequence.num_cached - 1
        return max(min(room, most), 0)

    def have_read(self, sequence: Sequence, end: int) -> None:
        """Make the pages that a sequence has filled findable: its first `end` tokens have been read."""
        size = self._cache.page_size
        salt, known = self._sharing[sequence].salt, self._sharing[sequence].known
        while salt is not None and (len(known) + 1) * size <= end:
            page = len(known)
            tokens = sequence.tokens[page * size : (page + 1) * size]
            known.append(self.prefixes.add(salt, known[-1] if known else None, tokens, sequence.pages[page]))
        of_prompt = self._snapshots is not None and self._snapshots.make(sequence, known)
        if self._offload:
            self._offload.save(sequence, known)
            if of_prompt:
                self._offload.save_snapshots(sequence, known)

    def wait_for_loading(self, seconds: float) -> bool:
        """Wait, at most so long, until pages are read from the store; False: none are being read."""
        return self._offload is not None and self._offload.wait_for_loading(seconds)

    def close(self) -> None:
        """Write what waits to be stored, and go on without the store."""
        if self._offload:
            self._offload.close()
            self._offload = None

    def _take_loaded(self) -> None:
        if self._offload:
            for sequence in [sequence for sequence in self.running if self._offload.finish(sequence)]:
                self.have_read(sequence, sequence.num_cached)

    def _admit(self) -> None:
        pool, slots = self._cache.pool, self._cache.slots
        for sequence in list(self.waiting):
            if len(self.running) == self._max_running or (slots and not slots.free_slots):
                return
            sharing = self._sharing[sequence]
            # The newest token is read even where all are known: what follows it is asked for.
            known = [] if sharing.salt is None else self.prefixes.find(sharing.salt, sequence.tokens[:-1])
            if self._is_read_by_another(sequence, len(known) * self._cache.page_size):
                continue
            new = self._cache.pages_for(len(sequence.tokens)) - len(known)
            taken = new + sum(pool.holders(each.page) == 0 for each in known)
            # Room to grow for those that run: else this one would soon be the youngest, and give its pages back.
            if taken + len(self.running) > pool.free_pages and (self.running or taken > pool.free_pages):
                return
            pool.share(each.page for each in known)
            sequence.pages = [each.page for each in known] + pool.allocate(new)
            sequence.num_cached = len(known) * self._cache.page_size
            if not sequence.times_given_back:
                sequence.num_found = sequence.num_cached
            if slots and self._snapshots:
                snapshot = self.prefixes.snapshot(known[-1]) if known else None
                sequence.slot = slots.resume(snapshot) if snapshot else slots.allocate()
                self._snapshots.begin(sequence)
            sharing.known = known
            self.counters.prefix_queries += len(sequence.tokens)
            self.counters.prefix_hits += sequence.num_cached
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=_age)
            if self._offload and sharing.salt is not None:
                self._offload.begin(sequence, sharing.salt, len(known))

    def _is_read_by_another(self, sequence: Sequence, known: int) -> bool:
        """Whether a running prompt is about to get to where `sequence` could go on, beyond its first `known` tokens."""
        salt = self._sharing[sequence].salt
        return salt is not None and any(
            not other.decodes
            and self._sharing[other].salt == salt
            and (end := self._next_end(other, known)) is not None
            and len(self._sharing[other].known) * self._cache.page_size < end <= len(other.tokens)
            and end < len(sequence.tokens)
            and other.tokens[:end] == sequence.tokens[:end]
            for other in self.running
        )

    def _next_end(self, sequence: Sequence, after: int) -> int | None:
        """Where others can next go on from what a prompt has read, beyond its first `after` tokens."""
        if self._snapshots:
            return self._snapshots.next_end(sequence, max(after, sequence.num_cached))
        return after + self._cache.page_size

    def _most_read(self, sequence: Sequence) -> int:
        """Tokens of a prompt that one step may read."""
        end = self._snapshots.next_end(sequence, sequence.num_cached) if self._snapshots else None
        return sequence.num_uncached if end is None else end - sequence.num_cached

    def _with_room(self) -> Iterator[Sequence]:
        """Running sequences that have a page for their next token, oldest first; the youngest make room."""
        for sequence in list(self.running):
            while sequence in self.running and sequence.num_uncached > 0 and self._needs_page(sequence):
                if self._cache.pool.free_pages:
                    sequence.pages += self._cache.pool.allocate(1)
                else:
                    self._preempt(self.running[-1])
            if sequence in self.running:
                yield sequence

    def _needs_page(self, sequence: Sequence) -> bool:
        return sequence.num_cached == len(sequence.pages) * self._cache.page_size

    def _preempt(self, sequence: Sequence) -> None:
        self.counters.preemptions += 1
        self.counters.lost_tokens += sequence.num_cached
        self.running.remove(sequence)
        self._give_back(sequence)
        insort(self.waiting, sequence, key=_age)

    def _give_back(self, sequence: Sequence) -> None:
        if self._offload:
            self._offload.forget(sequence)
        if self._forget:
            self._forget(sequence)
        if self._snapshots:
            self._snapshots.forget(sequence)
        if self._cache.slots and sequence.slot:
            self._cache.slots.free(sequence.slot)
        self._cache.pool.free(reversed(sequence.pages))  # of pages worth keeping the last goes first
        sequence.pages, sequence.slot, sequence.num_cached, sequence.draft = [], None, 0, []
        sequence.times_given_back += 1
        self._sharing[sequence].known = []

    def _is_loading(self, sequence: Sequence) -> bool:
        return self._offload is not None and self._offload.is_loading(sequence)


def _age(sequence: Sequence) -> int:
    return sequence.index
