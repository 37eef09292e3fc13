"""A `tokenizer.model` from what `sentencepiece_model` reads out of one: the fields of sentencepiece_model.proto."""

from __future__ import annotations

import struct

from latentkv.text.sentencepiece_model import PieceType, SentencePieceModel

_UNIGRAM, _BPE = 1, 2


def sentencepiece_bytes(model: SentencePieceModel) -> bytes:
    """The file's content; the sentencepiece package and `read_sentencepiece_model` read it."""
    unknown = next(i for i, piece in enumerate(model.pieces) if piece.type is PieceType.UNKNOWN)
    pieces = b"".join(
        _message(1, _message(1, piece.text.encode()) + _float(2, piece.score) + _number(3, piece.type))
        for piece in model.pieces
    )
    trainer = _number(3, _BPE if model.bpe else _UNIGRAM) + _number(35, model.byte_fallback) + _number(40, unknown)
    normalizer = (
        _message(1, b"identity" if not model.charsmap else b"user_defined")
        + _message(2, model.charsmap)
        + _number(3, model.add_dummy_prefix)
        + _number(4, model.remove_extra_whitespaces)
    )
    return pieces + _message(2, trainer) + _message(3, normalizer)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content
