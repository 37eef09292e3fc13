"""The decoders of `tokenizer.json` as incremental steps: pieces in, and out whatever can no longer change."""

import codecs
from typing import Any, Protocol, cast

_VISIBLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_HIDDEN = tuple(byte for byte in range(256) if byte not in _VISIBLE)
# GPT-2's way to write any byte as a visible character: printable Latin-1 as itself, the rest from U+0100 on.
BYTE_CHARACTERS = {byte: chr(byte) for byte in _VISIBLE} | {byte: chr(256 + i) for i, byte in enumerate(_HIDDEN)}
_CHARACTER_BYTES = {character: byte for byte, character in BYTE_CHARACTERS.items()}


class Step(Protocol):
    """One stage of decoding, with whatever it has to remember."""

    def feed(self, pieces: list[str], last: bool) -> list[str]:
        """Takes the next pieces and returns those that are certain; `last` says that no more will come."""
        ...

    def inside(self, piece: str) -> str | bytes:
        """What a piece is in the middle of a text; bytes where it may be a part of a character."""
        ...


class ByteLevel:
    """Characters stand for bytes; a UTF-8 character is held until its last byte, invalid bytes become U+FFFD."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, pieces: list[str], last: bool) -> list[str]:
        """See `Step.feed`."""
        text = self._utf8.decode(b"".join(map(self._bytes, pieces)), last)
        return [text] if text else []

    def inside(self, piece: str) -> str | bytes:
        """See `Step.inside`."""
        return self._bytes(piece)

    @staticmethod
    def _bytes(piece: str) -> bytes:
        try:
            return bytes(_CHARACTER_BYTES[character] for character in piece)
        except KeyError:  # an added token, which is written as itself
            return piece.encode("utf-8")


class ByteFallback:
    """Pieces `<0xE2>` are bytes. One invalid byte spoils its whole run, so a run is held until it ends."""

    def __init__(self) -> None:
        self._run = bytearray()

    def feed(self, pieces: list[str], last: bool) -> list[str]:
        """See `Step.feed`."""
        out: list[str] = []
        for piece in pieces:
            byte = self._byte(piece)
            if byte is None:
                out += [*self._end_run(), piece]
            else:
                self._run.append(byte)
        return out + self._end_run() if last else out

    def inside(self, piece: str) -> str | bytes:
        """See `Step.inside`."""
        byte = self._byte(piece)
        return piece if byte is None else bytes([byte])

    def _end_run(self) -> list[str]:
        run = bytes(self._run)
        self._run.clear()
        try:
            return [run.decode("utf-8")] if run else []
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)

    @staticmethod
    def _byte(piece: str) -> int | None:
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            try:
                return int(piece[3:5], 16)
            except ValueError:
                return None
        return None


class Replace:
    """One character is replaced wherever it stands."""

    def __init__(self, character: str, content: str) -> None:
        self._character, self._content = character, content

    def feed(self, pieces: list[str], last: bool) -> list[str]:
        """See `Step.feed`."""
        return [piece.replace(self._character, self._content) for piece in pieces]

    def inside(self, piece: str) -> str | bytes:
        """See `Step.inside`."""
        return piece.replace(self._character, self._content)


class StripStart:
    """The first characters of the whole text are dropped if they are `content`, at most `count` of them."""

    def __init__(self, content: str, count: int) -> None:
        self._content, self._count = content, count

    def feed(self, pieces: list[str], last: bool) -> list[str]:
        """See `Step.feed`."""
        text = "".join(pieces)
        while self._count and text:
            if not text.startswith(self._content):
                self._count = 0
                break
            text = text[1:]
            self._count -= 1
        return [text] if text else []

    def inside(self, piece: str) -> str | bytes:
        """See `Step.inside`."""
        return piece


class Metaspace:
    """The replacement character is a space, except in the first piece, where it was only put in front."""

    def __init__(self, character: str, drop_first: bool) -> None:
        self._character, self._drop = character, drop_first

    def feed(self, pieces: list[str], last: bool) -> list[str]:
        """See `Step.feed`."""
        out: list[str] = []
        for piece in pieces:
            out.append(piece.replace(self._character, "" if self._drop else " "))
            self._drop = False
        return out

    def inside(self, piece: str) -> str | bytes:
        """See `Step.inside`."""
        return piece.replace(self._character, " ")


def build_steps(decoder: dict[str, Any] | None) -> list[Step] | None:
    """Builds fresh steps for a decoder as `tokenizer.json` writes it.

    Returns:
        The steps, or None for a decoder that cannot be followed piece by piece.
    """
    if decoder is None:
        return None
    sequence = cast(list[dict[str, Any]], decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]
    steps: list[Step] = []
    fused = False
    for part in sequence:
        if part["type"] == "Fuse":
            fused = True
            continue
        step = _build_step(part, fused)
        if step is None:
            return None
        fused = fused or isinstance(step, ByteLevel)
        steps.append(step)
    return steps


def _build_step(part: dict[str, Any], fused: bool) -> Step | None:
    match part:
        case {"type": "ByteLevel"} if not fused:
            return ByteLevel()
        case {"type": "ByteFallback"} if not fused:
            return ByteFallback()
        case {"type": "Replace", "pattern": {"String": str(character)}, "content": str(content)} if len(character) == 1:
            return Replace(character, content)
        case {"type": "Strip", "content": str(content), "start": int(count), "stop": 0} if fused:
            return StripStart(content, count)
        case {"type": "Metaspace", "replacement": str(character)} if not fused:
            return Metaspace(character, part.get("prepend_scheme", "always") != "never")
        case _:
            return None
