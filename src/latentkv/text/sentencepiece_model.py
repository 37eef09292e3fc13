"""What a SentencePiece `tokenizer.model` holds: pieces with scores, and how texts are normalised.

The file is one message of protocol buffers, whose fields are those of sentencepiece_model.proto. They are read here:
this is the only such file, and four of its messages matter; the library would be a dependency more, whose C++ parses
what strangers wrote.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from latentkv.errors import TokenizerError

MAX_BYTES = 64 << 20
"""Size limit of such a file, in bytes: fourteen times the largest known."""

MAX_PIECE = 512
"""Characters of a piece; trainers stop at 16 unless told otherwise."""


class PieceType(IntEnum):
    """What a piece is for, in the numbers of the file."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True)
class SentencePieceModel:
    """A `tokenizer.model`.

    Attributes:
        bpe: whether pieces are merged by score; otherwise the likeliest sequence of them is taken (unigram).
        pieces: in the order of their ids.
        byte_fallback: whether characters outside the vocabulary become bytes.
        named_tokens: texts of `bos_token`, `eos_token`, `unk_token` and `pad_token`, as far as they are pieces.
        charsmap: what is replaced by what, compiled; empty for none.
        add_dummy_prefix: whether a text begins with a space that it did not have.
        remove_extra_whitespaces: whether spaces around a text are dropped, and several in it made one.
    """

    bpe: bool
    pieces: tuple[Piece, ...]
    byte_fallback: bool
    named_tokens: dict[str, str]
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_sentencepiece_model(path: Path) -> SentencePieceModel:
    """Reads a `tokenizer.model`.

    Raises:
        TokenizerError: it is something else, damaged, or of a kind that is not supported.
    """
    try:
        size = path.stat().st_size
        content = path.read_bytes() if path.is_file() and size <= MAX_BYTES else b""
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read ({error.strerror}).") from None
    if not content:
        what = "is empty" if size == 0 else f"has {size:,} bytes, and no tokenizer has more than {MAX_BYTES:,}"
        raise TokenizerError(f"{path} {what}: fetch the file again.")
    _refuse_others(path, content)
    try:
        return _model(content)
    except _DamagedError as error:
        raise TokenizerError(f"{path} is no SentencePiece model, or damaged ({error}): fetch the file again.") from None
    except TokenizerError as error:
        raise TokenizerError(f"{path} {error}") from None


def _refuse_others(path: Path, content: bytes) -> None:
    """Names what else bears this file's name."""
    start = content[:64].lstrip()
    if start.startswith(b"version https://git-lfs"):
        raise TokenizerError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder.")
    if start.startswith((b"{", b"[", b"<")):
        what = "HTML" if start.startswith(b"<") else "JSON"
        raise TokenizerError(f"{path} holds {what}, not a SentencePiece model: fetch the file again.")
    token, _, rank = content.split(b"\n", 1)[0].partition(b" ")
    if rank.strip().isdigit() and token.isascii() and token.decode("ascii").isprintable():
        raise TokenizerError(
            f"{path} is a tiktoken file (tokens in base64 and their ranks), which does not say how text is cut: take "
            "the tokenizer.json of the same model; if it is Kimi's or Moonlight's, name the file tiktoken.model."
        )


class _DamagedError(Exception):
    """The bytes are no message of this kind."""


_Field = int | bytes


def _fields(message: bytes) -> Iterator[tuple[int, _Field]]:
    """(number, value) of each field: a number, or the bytes of anything else."""
    position, end = 0, len(message)
    while position < end:
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise _DamagedError("a field has the number 0")
        if wire == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire == 2:
            length, position = _varint(message, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise _DamagedError(f"a field has the unknown kind {wire}")
        if length > end - position:
            raise _DamagedError("it ends in the middle of a field")
        yield number, message[position : position + length]
        position += length


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise _DamagedError("it ends in the middle of a number")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position
    raise _DamagedError("a number has no end")


def _last_fields(message: bytes) -> dict[int, _Field]:
    return dict(_fields(message))


def _model(content: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    specs: dict[int, dict[int, _Field]] = {2: {}, 3: {}, 5: {}}
    for number, value in _fields(content):
        if number == 1:
            pieces.append(_piece(_bytes(value)))
        elif number in specs:
            specs[number] |= _last_fields(_bytes(value))
    trainer, normalizer, denormalizer = specs[2], specs[3], specs[5]
    kind = _number(trainer, 3, 1)
    if not pieces:
        raise _DamagedError("it has no pieces")
    if kind not in (1, 2):
        name = {3: "word", 4: "character"}.get(kind, str(kind))
        raise TokenizerError(f"is a SentencePiece model of the type {name}; BPE and unigram are supported.")
    for spec, number, default, unsupported in (
        (trainer, 24, 0, "treat_whitespace_as_suffix"),
        (normalizer, 5, 1, "escape_whitespaces=false"),
    ):
        if _number(spec, number, default) != default:
            raise TokenizerError(f"is a SentencePiece model with {unsupported}, which is not supported.")
    if denormalizer.get(2):
        raise TokenizerError("is a SentencePiece model with a denormalizer, which is not supported.")
    _require_consistent(pieces)
    byte_fallback = any(piece.type is PieceType.BYTE for piece in pieces)
    special = {piece.text for piece in pieces if piece.type in (PieceType.CONTROL, PieceType.UNKNOWN)}
    named = {
        name: _text(trainer.get(number, default.encode()))
        for name, number, default in (
            ("bos_token", 46, "<s>"),
            ("eos_token", 47, "</s>"),
            ("unk_token", 45, "<unk>"),
            ("pad_token", 48, "<pad>"),
        )
    }
    return SentencePieceModel(
        bpe=kind == 2,
        pieces=tuple(pieces),
        byte_fallback=byte_fallback,
        named_tokens={name: text for name, text in named.items() if text in special},
        charsmap=_bytes(normalizer.get(2, b"")),
        add_dummy_prefix=bool(_number(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(_number(normalizer, 4, 1)),
    )


def _piece(message: bytes) -> Piece:
    fields = _last_fields(message)
    score = _bytes(fields.get(2, b"\0\0\0\0"))
    kind = _number(fields, 3, 1)
    if len(score) != 4 or not math.isfinite(value := struct.unpack("<f", score)[0]):
        raise _DamagedError("a piece's score is no number")
    if not 1 <= kind <= 6:
        raise _DamagedError(f"a piece has the unknown type {kind}")
    return Piece(_text(fields.get(1, b"")), value, PieceType(kind))


def _require_consistent(pieces: list[Piece]) -> None:
    texts = {piece.text for piece in pieces}
    if "" in texts or len(texts) != len(pieces):
        raise _DamagedError("a piece is empty or comes twice")
    if max(map(len, texts)) > MAX_PIECE:
        raise _DamagedError(f"a piece has more than {MAX_PIECE} characters")
    if sum(piece.type is PieceType.UNKNOWN for piece in pieces) != 1:
        raise _DamagedError("it must have one piece for what is unknown")
    if any(piece.type is PieceType.UNUSED for piece in pieces):
        raise TokenizerError("is a SentencePiece model with unused pieces, which is not supported.")
    found = {piece.text for piece in pieces if piece.type is PieceType.BYTE}
    if found and found != {f"<0x{byte:02X}>" for byte in range(256)}:
        raise _DamagedError("it has some of the 256 bytes and lacks others")


def _number(fields: dict[int, _Field], number: int, default: int) -> int:
    value = fields.get(number, default)
    if isinstance(value, bytes):
        raise _DamagedError(f"field {number} is no number")
    return value


def _bytes(value: _Field) -> bytes:
    if isinstance(value, int):
        raise _DamagedError("a number stands where bytes should")
    return value


def _text(value: _Field) -> str:
    try:
        return _bytes(value).decode("utf-8")
    except UnicodeDecodeError:
        raise _DamagedError("a text is no UTF-8") from None
