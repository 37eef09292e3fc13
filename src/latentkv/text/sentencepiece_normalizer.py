"""How SentencePiece prepares a text: characters replaced by a compiled table, spaces dropped, written as ▁."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence

from latentkv.errors import TokenizerError

SPACE = "▁"
_LONGEST_KEY = 64
"""Characters of a key at most; the longest known has 18."""


class CharacterMap:
    """The compiled table of a model (`precompiled_charsmap`).

    It holds a double-array trie of what is replaced (little-endian words, after their size in bytes), and after it the
    replacements, each ended by a zero byte; the longest key that fits is replaced.

    Raises:
        TokenizerError: the table is damaged.
    """

    def __init__(self, table: bytes) -> None:
        size = struct.unpack_from("<I", table)[0] if len(table) >= 4 else 0
        if size == 0 or size % 4 or size > len(table) - 4:
            raise TokenizerError("The tokenizer.model's table of characters is damaged: fetch the file again.")
        self._units = struct.unpack_from(f"<{size // 4}I", table, 4)
        self._targets = table[4 + size :]
        self._begins: dict[str, bool] = {}

    def apply(self, text: str, kept: re.Pattern[str] | None) -> str:
        """The text with all keys replaced, except inside what `kept` matches."""
        touched = "".join(character for character in set(text) if self._begins_key(character))
        if not touched:
            return text
        pattern = f"[{re.escape(touched)}]"
        stop = re.compile(pattern if kept is None else f"(?:{kept.pattern})|{pattern}")
        return "".join(self._parts(text, stop, kept))

    def _parts(self, text: str, stop: re.Pattern[str], kept: re.Pattern[str] | None) -> Iterator[str]:
        position = 0
        while found := stop.search(text, position):
            start = found.start()
            yield text[position:start]
            if kept is not None and (whole := kept.match(text, start)):
                position = whole.end()
                yield whole.group()
                continue
            length, replacement = self._longest(text, start)
            position = start + max(length, 1)
            yield replacement if length else text[start]
        yield text[position:]

    def _longest(self, text: str, start: int) -> tuple[int, str]:
        """(characters of the longest key at `start`, what replaces them); (0, "") if there is none."""
        node = self._offset(self._unit(0))
        best, target = 0, 0
        for length, character in enumerate(text[start : start + _LONGEST_KEY], 1):
            reached, ends = self._step(node, character)
            if reached is None:
                break
            node = reached
            if ends:
                best, target = length, self._unit(node) & 0x7FFF_FFFF
        return best, self._target(target) if best else ""

    def _begins_key(self, character: str) -> bool:
        """Whether a key begins with this character."""
        if character not in self._begins:
            self._begins[character] = self._step(self._offset(self._unit(0)), character)[0] is not None
        return self._begins[character]

    def _step(self, node: int, character: str) -> tuple[int | None, bool]:
        """(the node that a character leads to, whether a key ends there); (None, False) if no key goes on so."""
        unit = 0
        for byte in character.encode():
            node ^= byte
            unit = self._unit(node)
            if unit & 0x8000_00FF != byte:
                return None, False
            node ^= self._offset(unit)
        return node, bool(unit >> 8 & 1)

    def _unit(self, node: int) -> int:
        return self._units[node] if node < len(self._units) else 0

    @staticmethod
    def _offset(unit: int) -> int:
        return (unit >> 10) << ((unit & 0x200) >> 6)

    def _target(self, start: int) -> str:
        end = self._targets.find(b"\0", start)
        return self._targets[start : end if end >= 0 else None].decode("utf-8", errors="replace")


class Normalizer:
    """What is done to a text before it is cut into pieces.

    Args:
        charsmap: the model's compiled table; empty for none.
        kept: pieces that are left as they are, wherever they stand.
        add_dummy_prefix: put a space in front.
        remove_extra_whitespaces: drop spaces around the text, and make several in it one.
    """

    def __init__(
        self, charsmap: bytes, kept: Sequence[str], *, add_dummy_prefix: bool, remove_extra_whitespaces: bool
    ) -> None:
        self._map = CharacterMap(charsmap) if charsmap else None
        longest_first = sorted(kept, key=len, reverse=True)
        self._kept = re.compile("|".join(map(re.escape, longest_first))) if kept else None
        self._prefix = SPACE if add_dummy_prefix else ""
        self._remove = remove_extra_whitespaces

    def normalize(self, text: str, *, begins: bool, ends: bool) -> str:
        """The text as pieces spell it; `begins` and `ends` say whether it is the first and the last part of a whole."""
        if not text:
            return ""
        if self._map is not None:
            text = self._map.apply(text, self._kept)
        if self._remove:
            text = re.sub(" {2,}", " ", text.lstrip(" ") if begins else text)
        text = text.replace(" ", SPACE)
        text = self._prefix + text if begins else text
        return text.rstrip(SPACE) if self._remove and ends else text
