"""`Snapshots`: at the ends of which pages the recurrent states of a text are kept to go on from."""

from __future__ import annotations

from dataclasses import dataclass

from latentkv.engine.sequence import Sequence
from latentkv.state import KnownPage, PrefixIndex

EVERY = 64
"""Pages of a long prompt after which a snapshot is made: more would take more memory than the pages."""

LEAST_PAGES = 4
"""Pages that a prompt must have read anew for a snapshot at its end: its last tokens take a step of their own then."""


@dataclass
class _Kept:
    """What is kept of a running sequence.

    Attributes:
        prompt: tokens that it had when it was admitted.
        last_end: of these, those up to the end of the last page that a request with the same tokens could begin with.
        is_due: whether there is to be a snapshot.
        newest: the page of the snapshot that was made last of its answer; the next one takes its place.
    """

    prompt: int
    last_end: int
    is_due: bool
    newest: KnownPage | None = None


class Snapshots:
    """Makes snapshots of running sequences.

    Of a prompt at the end of its last page, unless little of it is new, and every so many pages before; of an answer at
    the end of its last page so far. Whoever has the same beginning goes on from the last snapshot in it: the next turn
    of a conversation, a prompt with the same instructions, or the sequence itself after others have taken its pages.

    Args:
        prefixes: where they are found.
        page_size: tokens a page.
        every: pages of a prompt.
    """

    def __init__(self, prefixes: PrefixIndex, page_size: int, every: int = EVERY) -> None:
        self._prefixes = prefixes
        self._page_size = page_size
        self._step = every * page_size
        self._kept: dict[Sequence, _Kept] = {}

    def begin(self, sequence: Sequence) -> None:
        """A sequence was admitted; what it has not read yet counts as its prompt."""
        last = (len(sequence.tokens) - 1) // self._page_size * self._page_size
        is_due = last - sequence.num_cached >= LEAST_PAGES * self._page_size
        self._kept[sequence] = _Kept(len(sequence.tokens), last, is_due)

    def forget(self, sequence: Sequence) -> None:
        """A sequence gives its pages back; its snapshots stay."""
        self._kept.pop(sequence, None)

    def next_end(self, sequence: Sequence, after: int) -> int | None:
        """Where, beyond its first `after` tokens, the next snapshot of a prompt is made, for which its share ends."""
        kept, end = self._kept[sequence], (after // self._step + 1) * self._step
        if kept.is_due:
            end = min(end, kept.last_end)
        return end if after < end <= kept.last_end else None

    def make(self, sequence: Sequence, known: list[KnownPage]) -> bool:
        """Make the snapshot that is due, if any, after a step; the first pages of the sequence are `known`.

        Returns:
            Whether one of a prompt was due: the next one does not take its place.
        """
        slot, pages, kept = sequence.slot, sequence.num_cached // self._page_size, self._kept[sequence]
        end = pages * self._page_size
        # Tokens of a draft that were right wait beside the state: they are copied with it.
        if slot is None or not 0 < pages <= len(known) or slot.num_tokens > end:
            return False
        of_prompt = end % self._step == 0 or (kept.is_due and end == kept.last_end)
        if not of_prompt and sequence.num_cached < kept.prompt:
            return False
        if kept.newest and not of_prompt:
            self._prefixes.drop_snapshot(kept.newest)
            kept.newest = None
        if self._prefixes.add_snapshot(known[pages - 1], slot) and not of_prompt:
            kept.newest = known[pages - 1]
        return of_prompt
