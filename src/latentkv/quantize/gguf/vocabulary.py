"""A model's tokenizer -> the metadata of a GGUF file, which cut texts as it does or are not written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from latentkv.checkpoint.gguf.tensors import GGUFTensors, is_gguf
from latentkv.errors import LatentKVError, TokenizerError
from latentkv.json_files import INDEX_BYTES, read_json
from latentkv.llm_options import end_ids
from latentkv.models.config import ModelConfig
from latentkv.quantize.gguf.merges import merges_of_ranks, scores_of_merges
from latentkv.text import Tokenizer, has_tokenizer, load_tokenizer
from latentkv.text.gguf_cutting import cutting_of, name_of_cutting
from latentkv.text.gguf_tokenizer import gguf_tokenizer
from latentkv.text.sentencepiece_model import PieceType, read_sentencepiece_model
from latentkv.text.settings import read_settings

NO_TOKENIZER = "none"
"""What to ask for in place of a way to cut texts, so that the file gets no tokenizer."""

_END_NAMES = ("eos", "eot", "eom")
_REMEDY = f"name the nearest way with --pre (some texts become other tokens), or --pre {NO_TOKENIZER} for no tokenizer"

# Texts in which ways to cut differ: contractions, numbers, spaces and line ends, case, scripts, marks, signs, bytes.
_PROBES = (
    "I'LL say it's 1234567 (or 3.14)... don't, it’s 'sun'",
    '  the  man\t\n\n said:\r\n "No!"  \n',
    "HTMLParser camelCase iPhone's //note\n/* $x += y_2; */ ~|`^ <=>",
    "中文字 and かな, 한국어ㄱㅎ ㄅㄆ。“q”… １２ ½ Ⅷ \u3000\u00a0x",
    "naïve e\u0301te\u0301 नमस् Привет!! 🐋👍🏽 [word] #tag @me -the- a.b,c;d",
)


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        values: by key.
        notes: what people should know of it, a sentence each.
    """

    values: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def vocabulary_metadata(folder: Path, config: ModelConfig, pre: str | None = None) -> Vocabulary:
    """The metadata of a model's tokenizer; those of a GGUF file as they are.

    Args:
        folder: of the model, or its GGUF file.
        config: of the model.
        pre: the name of a way to cut texts, though it is not the tokenizer's own; "none": no tokenizer; None: its own.

    Raises:
        TokenizerError: it is damaged, or of a kind that GGUF has no words for.
    """
    if pre == NO_TOKENIZER or not has_tokenizer(folder):
        return Vocabulary({"tokenizer.ggml.model": "no_vocab"})
    if is_gguf(folder):
        return _of_a_file(folder, pre)
    tokenizer, settings = load_tokenizer(folder), read_settings(folder)
    path, model = folder / "tokenizer.json", {}
    if path.exists():
        content = read_json(path, TokenizerError, most_bytes=INDEX_BYTES)
        found = content.get("model")
        model = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
        is_pieces = model.get("byte_fallback") is True
    else:
        content, is_pieces = {}, not any(folder.glob("*.tiktoken")) and (folder / "tokenizer.model").exists()
    kind, is_added = ("llama" if is_pieces else "gpt2"), tokenizer.added_ids
    types = _types(tokenizer, config.vocab_size, is_added)
    values: dict[str, Any] = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": _tokens(tokenizer, config.vocab_size),
        "tokenizer.ggml.token_type": types,
    }
    if is_pieces:
        values |= _pieces(folder, tokenizer, model, values["tokenizer.ggml.tokens"], types)
    else:
        values |= _byte_level(folder, tokenizer, content, model, pre)
    ids, notes = _ids(tokenizer, config)
    values |= ids
    values |= _frame(folder, tokenizer)
    values |= {_template_key(name): source for name, source in settings.chat_templates.items()}
    notes += _compared(folder, tokenizer, values, is_exact=pre is None)
    return Vocabulary(values, tuple(notes))


def _of_a_file(file: Path, pre: str | None) -> Vocabulary:
    """What that file says; a negative id names no token, and is left out."""
    said = {
        key: value
        for key, value in GGUFTensors(file).metadata.items()
        if key.startswith("tokenizer.") and not (isinstance(value, int) and value < 0)
    }
    if pre is None or "tokenizer.ggml.merges" not in said:
        return Vocabulary(said)
    cutting_of(pre)
    said["tokenizer.ggml.pre"] = pre
    return Vocabulary(said, tuple(_compared(file, load_tokenizer(file), said, is_exact=False)))


def _tokens(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    return [_piece(tokenizer, token_id) or f"[PAD{token_id}]" for token_id in range(vocab_size)]


def _piece(tokenizer: Tokenizer, token_id: int) -> str | None:
    return tokenizer.piece(token_id) if token_id < tokenizer.vocab_size else None


def _types(tokenizer: Tokenizer, vocab_size: int, added: frozenset[int]) -> list[int]:
    def kind(token_id: int) -> PieceType:
        if _piece(tokenizer, token_id) is None:
            return PieceType.UNUSED
        if token_id in tokenizer.special_ids:
            return PieceType.CONTROL
        return PieceType.USER_DEFINED if token_id in added else PieceType.NORMAL

    return [int(kind(token_id)) for token_id in range(vocab_size)]


def _byte_level(
    folder: Path, tokenizer: Tokenizer, content: Mapping[str, Any], model: Mapping[str, Any], pre: str | None
) -> dict[str, Any]:
    """Merges, and the way texts are cut by its name."""
    if not content and (folder / "tiktoken.model").exists():
        name = pre or "kimi-k2"  # the only such file that is read
        pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size) if i not in tokenizer.added_ids]
        return {"tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges_of_ranks([p for p in pieces if p])}
    if model.get("type") != "BPE" or (tokenizer.decoder or {}).get("type") != "ByteLevel":
        raise TokenizerError(
            f"{folder}'s tokenizer is neither byte-level BPE in a tokenizer.json or tiktoken.model nor SentencePiece "
            f"BPE, of which GGUF files are written: use --pre {NO_TOKENIZER} to leave it out"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise TokenizerError(
                f"{folder / 'tokenizer.json'} has {key}={model[key]!r}, which GGUF has no key for: use --pre "
                f"{NO_TOKENIZER} to leave the tokenizer out"
            )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in cast("list[Any]", model.get("merges", []))]
    if pre is not None:
        cutting_of(pre)
        return {"tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}
    name = name_of_cutting(
        content.get("pre_tokenizer"),
        content.get("normalizer"),
        whole_pieces=bool(model.get("ignore_merges")),
        merges_digits=any(_has_digits(token) for token in cast("dict[str, Any]", model.get("vocab", {}))),
    )
    if name is None:
        raise TokenizerError(
            f"{folder / 'tokenizer.json'} cuts texts before it merges them in a way that GGUF (llama.cpp) has no name "
            f"for: {_REMEDY}"
        )
    return {"tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}


def _has_digits(token: str) -> bool:
    return any(one.isnumeric() and other.isnumeric() for one, other in pairwise(token))


def _pieces(
    folder: Path, tokenizer: Tokenizer, model: Mapping[str, Any], tokens: Sequence[str], types: list[int]
) -> dict[str, Any]:
    """Scores of a SentencePiece vocabulary; `types` gets its bytes and what stands for the unknown."""
    unknown = tokenizer.named_id("unk_token")
    if unknown is None and isinstance(model.get("unk_token"), str):
        unknown = tokenizer.token_id(cast("str", model["unk_token"]))
    bytes_found = {f"<0x{byte:02X}>" for byte in range(256)}
    for token_id, token in enumerate(tokens):
        if token in bytes_found:
            types[token_id] = int(PieceType.BYTE)
    if unknown is not None and unknown < len(types):
        types[unknown] = int(PieceType.UNKNOWN)
    scores = [0.0] * len(tokens)
    if (path := folder / "tokenizer.model").exists():
        pieces = read_sentencepiece_model(path)
        if not pieces.bpe:
            raise TokenizerError(
                f"{path} takes the likeliest pieces (unigram), which GGUF files are not written of: use --pre "
                f"{NO_TOKENIZER} to leave the tokenizer out"
            )
        for token_id, piece in enumerate(pieces.pieces[: len(scores)]):
            scores[token_id] = float(piece.score)
    else:
        found = scores_of_merges(cast("list[Any]", model.get("merges", [])), tokens, types)
        if found is None:
            raise TokenizerError(
                f"{folder / 'tokenizer.json'} merges pieces in an order that no scores give: put its tokenizer.model "
                f"beside it, or use --pre {NO_TOKENIZER} to leave the tokenizer out"
            )
        scores = found
    first = tokenizer.encode("a", add_bos=False)
    begins = bool(first) and (tokenizer.piece(first[0]) or "").startswith("▁")
    return {"tokenizer.ggml.scores": scores, "tokenizer.ggml.add_space_prefix": begins}


def _ids(tokenizer: Tokenizer, config: ModelConfig) -> tuple[dict[str, int], list[str]]:
    """Tokens with a meaning, as far as the model has them."""
    found: dict[str, int] = {}
    for name, named in (("bos", "bos_token"), ("unknown", "unk_token"), ("padding", "pad_token")):
        token_id = tokenizer.named_id(named)
        if token_id is not None and token_id < config.vocab_size:
            found[f"tokenizer.ggml.{name}_token_id"] = token_id
    ends = [i for i in sorted(end_ids(config, tokenizer)) if i < config.vocab_size]
    first = [tokenizer.named_id("eos_token"), tokenizer.turn_end_id, *config.eos_token_ids]
    ordered = list(dict.fromkeys([i for i in first if i in ends] + ends))
    found |= {f"tokenizer.ggml.{name}_token_id": i for name, i in zip(_END_NAMES, ordered, strict=False)}
    left = ordered[len(_END_NAMES) :]
    texts = ", ".join(repr(tokenizer.piece(i)) for i in left)
    return found, [f"GGUF names three tokens that end a text; left out: {texts}"] if left else []


def _frame(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    around, bos, eos = tokenizer.encode(""), tokenizer.bos_id, tokenizer.named_id("eos_token")
    adds_bos = bos is not None and around[:1] == [bos]
    rest = around[1:] if adds_bos else around
    if rest not in ([], [eos]):
        raise TokenizerError(
            f"{folder}'s tokenizer puts {[tokenizer.piece(i) for i in around]} around a text, which GGUF has no keys "
            f"for: use --pre {NO_TOKENIZER} to leave the tokenizer out"
        )
    return {"tokenizer.ggml.add_bos_token": adds_bos, "tokenizer.ggml.add_eos_token": bool(rest)}


def _template_key(name: str) -> str:
    return "tokenizer.chat_template" + ("" if name == "default" else f".{name}")


def _compared(folder: Path, tokenizer: Tokenizer, values: Mapping[str, Any], *, is_exact: bool) -> list[str]:
    """Read the tokenizer back and see whether it gives the same tokens.

    Raises:
        TokenizerError: it does not, and was not asked to cut in another way than its own.
    """
    try:
        written = gguf_tokenizer(values)
    except LatentKVError as error:
        raise TokenizerError(
            f"{folder}'s tokenizer cannot be written as GGUF ({error}): use --pre {NO_TOKENIZER} to leave it out"
        ) from None
    other = next((text for text in _PROBES if written.encode(text) != tokenizer.encode(text)), None)
    if other is None:
        return []
    if not is_exact:
        return [f"texts are cut as by {values['tokenizer.ggml.pre']}: some become other tokens than the model's own"]
    raise TokenizerError(
        f"{folder}'s tokenizer gives other tokens than a GGUF file of it would, for {other!r:.40}: use --pre "
        f"{NO_TOKENIZER} to leave the tokenizer out"
    )
