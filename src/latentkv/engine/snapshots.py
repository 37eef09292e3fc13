"""`Snapshots`: at the ends of which pages the recurrent states of a text are kept to go on from."""

from __future__ import annotations

from dataclasses import dataclass

from latentkv.engine.sequence import Sequence
from latentkv.state import KnownPage, PrefixIndex

EVERY = 64
"""Pages of a long prompt after which a snapshot is made: more would take more memory than the pages."""


@dataclass
class _Kept:
    """What is kept of a running sequence.

    Attributes:
        prompt_end: tokens up to the end of the last page that a request with the same tokens could begin with.
        newest: the page of the snapshot that was made last while the sequence decoded; the next one takes its place.
    """

    prompt_end: int
    newest: KnownPage | None = None


class Snapshots:
    """Makes snapshots of running sequences.

    Of a prompt at the end of its last page, and every so many pages before; of an answer at the end of its last page so
    far. Whoever has the same beginning goes on from the last snapshot in it: the next turn of a conversation, a prompt
    with the same instructions, or the sequence itself after others have taken its pages.

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
        self._kept[sequence] = _Kept((len(sequence.tokens) - 1) // self._page_size * self._page_size)

    def forget(self, sequence: Sequence) -> None:
        """A sequence gives its pages back; its snapshots stay."""
        self._kept.pop(sequence, None)

    def next_end(self, sequence: Sequence, after: int) -> int | None:
        """Where, beyond its first `after` tokens, the next snapshot of a prompt is made, for which its share ends."""
        end = min((after // self._step + 1) * self._step, self._kept[sequence].prompt_end)
        return end if end > after else None

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
        of_prompt = end == kept.prompt_end or end % self._step == 0
        if end < kept.prompt_end and not of_prompt:
            return False
        if kept.newest and not of_prompt:
            self._prefixes.drop_snapshot(kept.newest)
            kept.newest = None
        if self._prefixes.add_snapshot(known[pages - 1], slot) and not of_prompt:
            kept.newest = known[pages - 1]
        return of_prompt
