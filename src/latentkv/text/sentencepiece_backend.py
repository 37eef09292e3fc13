"""A SentencePiece model on the `tokenizers` library: the same pieces for the same text."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import tokenizers
from tokenizers import AddedToken, decoders, models

from latentkv.errors import TokenizerError
from latentkv.text.sentencepiece_model import Piece, PieceType, SentencePieceModel
from latentkv.text.sentencepiece_normalizer import SPACE, Normalizer
from latentkv.text.settings import TokenizerSettings

_ANY_NUMBER = 1 << 20
_SPACES = re.compile(r"\s*")
_SPECIAL = (PieceType.CONTROL, PieceType.UNKNOWN)


class SentencePieceBackend:
    """Pieces and scores of a `tokenizer.model`, with the tokens that the files beside it add.

    The library knows only the pieces that a text may become. Special tokens and bytes are known here alone, so that no
    text is taken for them by what it spells.
    """

    def __init__(self, model: SentencePieceModel, settings: TokenizerSettings) -> None:
        table = _Table(model.pieces)
        for token_id, token in sorted(settings.added_tokens.items()):
            table.put(token_id, token, settings.added_tokens_file)
        for token in settings.special_tokens:
            table.mark_special(token)
        pieces = table.pieces
        self._pieces = [piece.text for piece in pieces]
        self._ids = {text: token_id for token_id, text in enumerate(self._pieces)}
        self.vocab_size = len(pieces)
        self.special_ids = frozenset(i for i, piece in enumerate(pieces) if piece.type in _SPECIAL)
        user_defined = [i for i, piece in enumerate(pieces) if piece.type is PieceType.USER_DEFINED]
        self.added_ids = self.special_ids | frozenset(user_defined)
        self._unknown = next(i for i, piece in enumerate(pieces) if piece.type is PieceType.UNKNOWN)
        self._bytes = [self._ids[f"<0x{byte:02X}>"] for byte in range(256)] if model.byte_fallback else None
        self._library = _library(model, pieces, self._unknown, table.flags)
        prefix = model.add_dummy_prefix if settings.add_prefix_space is None else settings.add_prefix_space
        self._normalizer = Normalizer(
            model.charsmap,
            [self._pieces[i] for i in user_defined],
            add_dummy_prefix=prefix,
            remove_extra_whitespaces=model.remove_extra_whitespaces,
        )
        self._flags = table.flags
        self._special_texts = _special_texts([self._pieces[i] for i in self.special_ids], table.flags)
        self._each_begins = settings.legacy
        named = settings.named_tokens
        self._frame = tuple(
            [self._ids[named[name]]] if asked and name in named else []
            for name, asked in (("bos_token", settings.add_bos), ("eos_token", settings.add_eos))
        )
        # Spaces that a text did not have: the one put in front, or any where a text cannot begin with one.
        strip = _ANY_NUMBER if model.remove_extra_whitespaces else int(prefix)
        self._decoder = _decoder(byte_fallback=model.byte_fallback, strip=strip)

    @property
    def decoder(self) -> dict[str, Any] | None:
        """See `Backend.decoder`."""
        return cast("dict[str, Any]", json.loads(self._decoder.__getstate__()))

    def encode(self, text: str, *, frame: bool, allow_special: bool) -> list[int]:
        """See `Backend.encode`."""
        parts = list(self._parts(text) if allow_special else [text])
        last = len(parts) - 1
        texts = [
            self._normalizer.normalize(part, begins=index == 0 or self._each_begins, ends=index == last)
            for index, part in enumerate(parts)
            if isinstance(part, str)
        ]
        # A batch, because the library lets other threads run only then.
        encoded = iter(zip(texts, self._library.encode_batch(texts, add_special_tokens=False), strict=True))
        ids = [
            token_id
            for part in parts
            for token_id in ([part] if isinstance(part, int) else self._with_bytes(*next(encoded)))
        ]
        begin, end = self._frame
        return [*begin, *ids, *end] if frame else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """See `Backend.decode`."""
        known = [i for i in ids if 0 <= i < self.vocab_size and not (skip_special and i in self.special_ids)]
        return self._decoder.decode([self._pieces[i] for i in known])

    def token_id(self, token: str) -> int | None:
        """See `Backend.token_id`."""
        return self._ids.get(token)

    def piece(self, token_id: int) -> str | None:
        """See `Backend.piece`."""
        return self._pieces[token_id] if 0 <= token_id < self.vocab_size else None

    def _parts(self, text: str) -> Iterator[str | int]:
        """The text between special tokens, which are told by their ids; empty parts are left out."""
        position = 0
        while self._special_texts and (found := self._special_texts.search(text, position)):
            token = found.group()
            # The spaces that a token takes with it are no part of the pattern: looking for them from each space on, as
            # far as they go, would take time that grows with the square of their number.
            flags = self._flags.get(token)
            before = text[position : found.start()]
            if before := before.rstrip() if flags is not None and flags.lstrip else before:
                yield before
            yield self._ids[token]
            position = found.end()
            if flags is not None and flags.rstrip and (spaces := _SPACES.match(text, position)):
                position = spaces.end()
        if position < len(text):
            yield text[position:]

    def _with_bytes(self, text: str, encoding: tokenizers.Encoding) -> list[int]:
        """The ids of an encoded text, what is unknown written as bytes where the model has them."""
        ids = encoding.ids
        if self._bytes is None or self._unknown not in ids:
            return ids
        found: list[int] = []
        for token_id, (start, end) in zip(ids, encoding.offsets, strict=True):
            found += (
                [self._bytes[byte] for byte in text[start:end].encode()] if token_id == self._unknown else [token_id]
            )
        return found


class _Table:
    """The pieces of a model, and what the files beside it make of them."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = list(pieces)
        self.flags: dict[str, AddedToken] = {}
        self._ids = {piece.text: token_id for token_id, piece in enumerate(pieces)}

    def put(self, token_id: int, token: AddedToken, file: str) -> None:
        """Gives an id to a token: its own, the next free one, or that of a piece whose place it takes."""
        known = self._ids.get(token.content)
        if not token.content or token_id > len(self.pieces) or known not in (None, token_id):
            there = f"tokenizer.model gives it {known}" if known is not None else f"{len(self.pieces)} is the next free"
            raise TokenizerError(
                f"{file} gives the token {token.content!r} the id {token_id}, and {there}: take both files from the "
                "same checkpoint."
            )
        kind = PieceType.CONTROL if token.special else PieceType.USER_DEFINED
        if token_id == len(self.pieces):
            self.pieces.append(Piece(token.content, 0.0, kind))
        else:
            before = self.pieces[token_id]
            if before.type is PieceType.BYTE and before.text != token.content:
                raise TokenizerError(f"{file} gives the token {token.content!r} the id of the byte {before.text}.")
            keeps_type = before.type in (PieceType.UNKNOWN, PieceType.BYTE)
            self._ids.pop(before.text)
            self.pieces[token_id] = replace(before, text=token.content, type=before.type if keeps_type else kind)
        self._ids[token.content] = token_id
        self.flags[token.content] = token

    def mark_special(self, token: AddedToken) -> None:
        """Makes a token special; one without an id gets the next."""
        token_id = self._ids.get(token.content, len(self.pieces))
        if token_id == len(self.pieces) or self.pieces[token_id].type not in _SPECIAL:
            self.put(token_id, token, "tokenizer_config.json")


def _special_texts(texts: Sequence[str], flags: dict[str, AddedToken]) -> re.Pattern[str] | None:
    """Finds special tokens in a text, the longest where several begin."""

    def pattern(text: str) -> str:
        alone = text in flags and flags[text].single_word
        return rf"(?<!\w){re.escape(text)}(?!\w)" if alone else re.escape(text)

    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(pattern, longest_first))) if texts else None


def _library(
    model: SentencePieceModel, pieces: Sequence[Piece], unknown: int, added: Collection[str]
) -> tokenizers.Tokenizer:
    """The library's model of the pieces; those that no text may become have names with spaces, which no text has."""
    kinds = (PieceType.NORMAL, PieceType.USER_DEFINED)
    names = [piece.text.replace(" ", SPACE) if piece.type in kinds else f" {i}" for i, piece in enumerate(pieces)]
    try:
        if model.bpe:
            vocab = {name: i for i, name in enumerate(names)}
            core = models.BPE(vocab=vocab, merges=_merges(pieces), unk_token=names[unknown], fuse_unk=True)
        else:
            # Log-probabilities are below 0: a user-defined piece beats whatever else its characters could become.
            scores = [piece.score if piece.type is PieceType.NORMAL else 1.0 for piece in pieces]
            core = models.Unigram(list(zip(names, scores, strict=True)), unknown, False)
        library = tokenizers.Tokenizer(core)
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"The tokenizer.model's pieces cannot be used: {error}.") from error
    # BPE takes these whole before it merges anything; unigram finds the model's own by their scores.
    library.add_tokens(
        [
            AddedToken(name, normalized=False)
            for name, piece in zip(names, pieces, strict=True)
            if piece.type is PieceType.USER_DEFINED and (model.bpe or piece.text in added)
        ]
    )
    return library


def _merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Every pair of pieces that make a third, the highest score of what they make first."""
    scores = {piece.text: piece.score for piece in pieces if piece.type is PieceType.NORMAL}
    made = sorted(scores, key=lambda text: -scores[text])
    return [
        (text[:cut], text[cut:])
        for text in made
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]


def _decoder(*, byte_fallback: bool, strip: int) -> decoders.Decoder:
    steps: list[Any] = [decoders.Replace(SPACE, " ")]
    if byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if strip:
        steps.append(decoders.Strip(" ", strip, 0))
    return decoders.Sequence(steps)
