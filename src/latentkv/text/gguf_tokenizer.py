"""A GGUF file's metadata -> `Tokenizer`: byte-level BPE (`gpt2`) and SentencePiece by scores (`llama`)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from latentkv.checkpoint.gguf.metadata import Metadata
from latentkv.errors import TokenizerError
from latentkv.libraries import errors_as
from latentkv.text.backends import HuggingFaceBackend
from latentkv.text.foreign_steps import find_foreign_steps
from latentkv.text.gguf_cutting import Cutting, cutting_of
from latentkv.text.sentencepiece_backend import SentencePieceBackend
from latentkv.text.sentencepiece_model import MAX_PIECE, Piece, PieceType, SentencePieceModel
from latentkv.text.settings import TokenizerSettings
from latentkv.text.tokenizer import Tokenizer
from latentkv.text.vocab_merges import add_frame

_TOKENS, _TYPES, _MERGES, _SCORES = (f"tokenizer.ggml.{key}" for key in ("tokens", "token_type", "merges", "scores"))
_TEMPLATE = "tokenizer.chat_template"
_NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_SPECIAL = (PieceType.UNKNOWN, PieceType.CONTROL)
_ADDED = (*_SPECIAL, PieceType.USER_DEFINED)
_MOST_CHARACTERS = 1 << 23
"""Of all tokens together where each is cut everywhere to find its merges; the largest known have 2 million."""

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@dataclass(frozen=True)
class GGUFVocabulary:
    """A tokenizer as a file's metadata have it.

    Attributes:
        settings: special tokens, what is put around texts, chat templates.
        model: of byte-level BPE the library's object, with all tokens and the frame of texts; or of SentencePiece.
    """

    settings: TokenizerSettings
    model: tokenizers.Tokenizer | SentencePieceModel


def gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer and the chat templates in a GGUF file's metadata.

    Args:
        metadata: plain Python values by key, arrays as lists.

    Raises:
        TokenizerError: there is none, it is of a kind that is not read, or it is damaged.
    """
    found = gguf_vocabulary(metadata)
    if isinstance(found.model, SentencePieceModel):
        return Tokenizer(SentencePieceBackend(found.model, found.settings), found.settings)
    foreign = find_foreign_steps({"pre_tokenizer": json.loads(found.model.pre_tokenizer.__getstate__())})
    return Tokenizer(HuggingFaceBackend(found.model, found.settings, foreign), found.settings)


def gguf_vocabulary(metadata: Mapping[str, Any]) -> GGUFVocabulary:
    """What `gguf_tokenizer` is made of; takes and raises the same."""
    meta = Metadata(metadata, TokenizerError)
    kind = meta.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise TokenizerError(
            f"The GGUF file's tokenizer is of the kind {kind!r:.60}, which is not read here; gpt2 and llama are."
        )
    cutting = cutting_of(meta.text("tokenizer.ggml.pre")) if kind == "gpt2" else None
    pieces = _pieces(meta)
    settings = _settings(meta, metadata, pieces, adds_bos=cutting is None or cutting.add_bos)
    if cutting is None:
        return GGUFVocabulary(settings, _sentencepiece_model(meta, pieces))
    library = _byte_level(meta, pieces, cutting)
    library.add_tokens(list(settings.added_tokens.values()))  # all at once: one by one takes the square of their number
    add_frame(library, settings)
    return GGUFVocabulary(settings, library)


def _pieces(meta: Metadata) -> list[Piece]:
    """The vocabulary in the order of its ids; an empty text gets a name that no text is cut to, as in llama.cpp."""
    texts = meta.array(_TOKENS, str)
    if not texts:
        raise TokenizerError(f"The GGUF file's metadata: {_TOKENS} is empty, so that there is no tokenizer.")
    types = _as_long(meta, _TYPES, int, len(texts)) if meta.has(_TYPES) else [PieceType.NORMAL] * len(texts)
    scores = _as_long(meta, _SCORES, (int, float), len(texts)) if meta.has(_SCORES) else [0.0] * len(texts)
    seen: dict[str, int] = {}
    pieces: list[Piece] = []
    for token_id, (text, kind, score) in enumerate(zip(texts, types, scores, strict=True)):
        if kind not in iter(PieceType):
            raise TokenizerError(f"The GGUF file's metadata: {_TYPES} of token {token_id} is {kind}, which is no type.")
        if not math.isfinite(score):
            raise TokenizerError(
                f"The GGUF file's metadata: {_SCORES} of token {token_id} is {score}, which is no score."
            )
        text = text or f"[EMPTY_{token_id}]"
        if seen.setdefault(text, token_id) != token_id:
            raise TokenizerError(
                f"The GGUF file's metadata: {_TOKENS} gives two ids to {text!r:.40}, {seen[text]} and {token_id}."
            )
        pieces.append(Piece(text, float(score), PieceType(kind) if texts[token_id] else PieceType.UNUSED))
    return pieces


def _as_long(meta: Metadata, key: str, kind: type | tuple[type, ...], length: int) -> list[Any]:
    values = meta.array(key, kind)
    if len(values) != length:
        raise TokenizerError(
            f"The GGUF file's metadata: {key} is for {len(values)} tokens, and {_TOKENS} has {length}: the file is "
            "damaged."
        )
    return values


def _settings(
    meta: Metadata, metadata: Mapping[str, Any], pieces: Sequence[Piece], *, adds_bos: bool
) -> TokenizerSettings:
    ends = meta.end_ids()
    ids = {name: token_id for name in _NAMES if (token_id := meta.token_id(name)) is not None}
    # Padding may lie past all tokens: it is never looked up.
    for name, token_id in (*ids.items(), *(("end", token_id) for token_id in ends)):
        if not 0 <= token_id < len(pieces) and name != "padding":
            raise TokenizerError(
                f"The GGUF file's metadata: tokenizer.ggml's {name} token is {token_id}, outside the vocabulary of 0 "
                f"to {len(pieces) - 1}."
            )
    # What begins and ends a text stands for none, whatever its type says. For padding and what is unknown some files
    # name an ordinary token, which stays one.
    marks = {ids["bos"], *ends} if "bos" in ids else set(ends)
    special = {i for i, piece in enumerate(pieces) if i in marks or piece.type in _SPECIAL}
    named = {_NAMES[name]: pieces[i].text for name, i in ids.items() if i in special}
    add_bos, add_eos = (
        meta.flag("tokenizer.ggml.add_bos_token", adds_bos),
        meta.flag("tokenizer.ggml.add_eos_token", False),
    )
    for asked, name in ((add_bos, "bos"), (add_eos, "eos")):
        if asked and name not in ids and meta.has(f"tokenizer.ggml.add_{name}_token"):
            raise TokenizerError(
                f"The GGUF file's metadata: add_{name}_token asks for a token that {name}_token_id does not name."
            )
    return TokenizerSettings(
        named_tokens=named,
        added_tokens={
            i: AddedToken(piece.text, special=i in special, normalized=False)
            for i, piece in enumerate(pieces)
            if i in special or piece.type in _ADDED
        },
        added_tokens_file=f"The GGUF file's {_TOKENS}",
        add_bos=add_bos,
        add_eos=add_eos,
        # As llama.cpp does, which is all that says what a text after a special token begins with.
        legacy=True,
        eos_ids=frozenset(ends),
        chat_templates=dict(_templates(meta, metadata)),
    )


def _templates(meta: Metadata, metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in metadata:
        if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}."):
            yield key.removeprefix(_TEMPLATE).removeprefix(".") or "default", meta.text(key)


def _byte_level(meta: Metadata, pieces: Sequence[Piece], cutting: Cutting) -> tokenizers.Tokenizer:
    vocab = {piece.text: token_id for token_id, piece in enumerate(pieces)}
    if cutting.ranked or (cutting.whole_pieces and not meta.has(_MERGES)):
        merges = list(_ranked_merges(pieces))
    else:
        merges = [_merge(text) for text in meta.array(_MERGES, str)]
    with errors_as(TokenizerError, f"The GGUF file's {_MERGES} do not fit its {_TOKENS}"):
        library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=cutting.whole_pieces))
    library.decoder = decoders.ByteLevel()
    library.pre_tokenizer = cutting.pre_tokenizer()
    if cutting.nfc:
        library.normalizer = normalizers.NFC()
    return library


def _merge(text: str) -> tuple[str, str]:
    left, _, right = text.partition(" ")
    if not left or not right or " " in right:
        raise TokenizerError(f"The GGUF file's {_MERGES} has {text!r:.40}, which is no merge of two tokens.")
    return left, right


def _ranked_merges(pieces: Sequence[Piece]) -> Iterator[tuple[str, str]]:
    """Every pair of tokens that make a third, in the order of those thirds: what tiktoken merges."""
    plain = {piece.text: None for piece in pieces if piece.type is PieceType.NORMAL}
    _require_short(pieces)
    for text in plain:
        for cut in range(1, len(text)):
            if text[:cut] in plain and text[cut:] in plain:
                yield text[:cut], text[cut:]


def _sentencepiece_model(meta: Metadata, pieces: list[Piece]) -> SentencePieceModel:
    if not meta.has(_SCORES):
        raise TokenizerError(f"The GGUF file's metadata lack {_SCORES}, by which its tokenizer merges.")
    _require_short(pieces)
    unknown = [i for i, piece in enumerate(pieces) if piece.type is PieceType.UNKNOWN]
    if not unknown and (named := meta.token_id("unknown")) is not None:
        pieces[named] = Piece(pieces[named].text, pieces[named].score, PieceType.UNKNOWN)
        unknown = [named]
    if len(unknown) != 1:
        raise TokenizerError(
            f"The GGUF file's metadata: {len(unknown)} tokens stand for what is unknown, and there must be one."
        )
    bytes_found = {piece.text for piece in pieces if piece.type is PieceType.BYTE}
    if bytes_found and bytes_found != set(_BYTES):
        raise TokenizerError("The GGUF file's metadata: the tokenizer has some of the 256 bytes and lacks others.")
    return SentencePieceModel(
        bpe=True,
        pieces=tuple(pieces),
        byte_fallback=bool(bytes_found),
        named_tokens={},
        charsmap=b"",
        add_dummy_prefix=meta.flag("tokenizer.ggml.add_space_prefix", True),
        remove_extra_whitespaces=meta.flag("tokenizer.ggml.remove_extra_whitespaces", False),
    )


def _require_short(pieces: Sequence[Piece]) -> None:
    """Refuse tokens of which the merges would take without end to find."""
    if (total := sum(len(piece.text) for piece in pieces)) > _MOST_CHARACTERS:
        raise TokenizerError(
            f"The GGUF file's metadata: {_TOKENS} has {total:,} characters, and no tokenizer of this kind has more "
            f"than {_MOST_CHARACTERS:,}."
        )
    longest = max(pieces, key=lambda piece: len(piece.text))
    if len(longest.text) > MAX_PIECE:
        raise TokenizerError(
            f"The GGUF file's metadata: {_TOKENS} has a token of {len(longest.text)} characters, and none may have "
            f"more than {MAX_PIECE}."
        )
