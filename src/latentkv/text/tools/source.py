"""Text that is still coming, read by coroutines: they ask for what they expect and wait where it has not come yet."""

import re
from collections.abc import Generator
from functools import lru_cache

Waiting = Generator[None, None, None]
_SPACE = " \t\n\r"


class MalformedError(Exception):
    """The text is not what the format says; never leaves the parser."""


class EndedError(MalformedError):
    """The text ended where more was due."""


class Source:
    """The text that came and was not taken yet, which is at most the beginning of a marker while a reader waits.

    What is taken is remembered until `forget`, so that a reader that finds the text malformed can give it back.

    Attributes:
        ended: whether all text has come.
    """

    def __init__(self) -> None:
        self.ended = False
        self._text = ""
        self._at = 0
        self._taken: list[str] = []

    def push(self, text: str) -> None:
        """Appends what came."""
        self._text = self._text[self._at :] + text
        self._at = 0

    @property
    def exhausted(self) -> bool:
        """Whether everything was taken and no more will come."""
        return self.ended and self._at == len(self._text)

    def forget(self) -> None:
        """What was taken so far is settled."""
        self._taken.clear()

    def taken(self) -> str:
        """What was taken since the last `forget`."""
        return "".join(self._taken)

    def take(self, length: int) -> str:
        """Takes characters that are there."""
        text = self._text[self._at : self._at + length]
        self._at += length
        self._taken.append(text)
        return text

    def peek(self) -> tuple[str, int]:
        """The text that came last and where the part that was not taken begins in it."""
        return self._text, self._at

    def take_until(self, markers: tuple[str, ...], most: int | None = None) -> tuple[str, str | None]:
        """Takes all that cannot be part of a marker, up to the first one.

        Args:
            markers: none of them may hold another.
            most: characters to take, None for no limit.

        Returns:
            What was taken and the marker that follows, which is not taken; None if none does so far.
        """
        found = _pattern(markers).search(self._text, self._at) if markers else None
        held = 0 if found or self.ended or not markers else self._undecided(markers)
        length = (found.start() if found else len(self._text) - held) - self._at
        if most is not None and length > most:
            return self.take(most), None
        return self.take(length), found.group() if found else None

    def text_until(self, ends: tuple[str, ...], others: tuple[str, ...], limit: int) -> Generator[None, None, str]:
        """Takes a short text before one of `ends`, which is not taken.

        Raises:
            MalformedError: one of `others` comes first, or the text is longer than `limit`.
        """
        parts: list[str] = []
        size = 0
        while True:
            text, marker = self.take_until((*ends, *others), limit + 1 - size)
            parts.append(text)
            size += len(text)
            if size > limit or marker in others:
                raise MalformedError
            if marker is not None:
                return "".join(parts)
            if self.ended:
                raise EndedError
            yield

    def next_character(self) -> Generator[None, None, str]:
        """Takes whitespace and returns what follows it, which is not taken.

        Raises:
            EndedError: nothing does.
        """
        while True:
            end = self._at
            while end < len(self._text) and self._text[end] in _SPACE:
                end += 1
            if end > self._at:
                self.take(end - self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if self.ended:
                raise EndedError
            yield

    def expect(self, *markers: str) -> Generator[None, None, str]:
        """Takes whitespace and one of the markers, and returns that.

        Raises:
            MalformedError: something else comes.
        """
        while True:
            yield from self.next_character()
            for marker in markers:
                if self._text.startswith(marker, self._at):
                    return self.take(len(marker))
            rest = self._text[self._at : self._at + max(map(len, markers))]
            if not any(marker.startswith(rest) for marker in markers):
                raise MalformedError
            if self.ended:
                raise EndedError
            yield

    def _undecided(self, markers: tuple[str, ...]) -> int:
        """Length of the longest end of the text with which a marker begins."""
        longest = min(max(map(len, markers)) - 1, len(self._text) - self._at)
        for length in range(longest, 0, -1):
            end = self._text[-length:]
            if any(marker.startswith(end) for marker in markers):
                return length
        return 0


@lru_cache(maxsize=64)
def _pattern(markers: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, markers)))
