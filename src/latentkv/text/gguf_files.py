"""What lies beside the weights of a copy: a folder's files, or a GGUF file's tokenizer as such files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentkv.checkpoint.companions import copy_companions
from latentkv.checkpoint.gguf.tensors import GGUFTensors, is_gguf
from latentkv.errors import TokenizerError
from latentkv.files import write_json, write_text, write_whole
from latentkv.text.gguf_tokenizer import gguf_vocabulary
from latentkv.text.loading import has_tokenizer
from latentkv.text.sentencepiece_model import PieceType, SentencePieceModel
from latentkv.text.sentencepiece_writer import sentencepiece_bytes
from latentkv.text.settings import TokenizerSettings


def write_companions(source: Path, folder: Path) -> None:
    """Put what a copy of a model needs beside weights and config, each file whole or not at all.

    Args:
        source: folder of the model, or its GGUF file.
        folder: of the copy, which exists.

    Raises:
        TokenizerError: a GGUF file's tokenizer is damaged, or has what such files cannot say.
        OSError: a file cannot be read or written.
    """
    if not is_gguf(source):
        copy_companions(source, folder)
    elif has_tokenizer(source):
        write_tokenizer_files(GGUFTensors(source).metadata, folder)


def write_tokenizer_files(metadata: Mapping[str, Any], folder: Path) -> None:
    """Write a GGUF file's tokenizer as `tokenizer.json` or `tokenizer.model`, with the settings beside it.

    LatentKV and transformers read from them what the file says. Raises as `write_companions`.

    Args:
        metadata: of the file, plain Python values by key.
        folder: which exists.
    """
    found = gguf_vocabulary(metadata)
    model = found.model
    is_pieces = isinstance(model, SentencePieceModel)
    if is_pieces:
        content = sentencepiece_bytes(_without_padding(model))
        write_whole(folder / "tokenizer.model", lambda temporary: temporary.write_bytes(content))
    else:
        write_text(folder / "tokenizer.json", model.to_str())
    write_json(folder / "tokenizer_config.json", _config(found.settings, is_pieces=is_pieces))
    if found.settings.eos_ids:
        write_json(folder / "generation_config.json", {"eos_token_id": sorted(found.settings.eos_ids)})


def _without_padding(model: SentencePieceModel) -> SentencePieceModel:
    """Without the pieces at the end that no text becomes, which fill up a vocabulary."""
    used = max(i for i, piece in enumerate(model.pieces) if piece.type is not PieceType.UNUSED) + 1
    if any(piece.type is PieceType.UNUSED for piece in model.pieces[:used]):
        raise TokenizerError(
            "The GGUF file's tokenizer has unused pieces between others, which a tokenizer.model is not written with: "
            "take the tokenizer of the original release."
        )
    return replace(model, pieces=model.pieces[:used])


def _config(settings: TokenizerSettings, *, is_pieces: bool) -> dict[str, Any]:
    templates: Any = settings.chat_templates.get("default")
    if set(settings.chat_templates) - {"default"}:
        templates = [{"name": name, "template": source} for name, source in settings.chat_templates.items()]
    return {
        "tokenizer_class": "LlamaTokenizer" if is_pieces else "PreTrainedTokenizerFast",
        **settings.named_tokens,
        "add_bos_token": settings.add_bos,
        "add_eos_token": settings.add_eos,
        "added_tokens_decoder": {
            str(token_id): {"content": token.content, "special": token.special, "normalized": token.normalized}
            for token_id, token in settings.added_tokens.items()
        },
        "clean_up_tokenization_spaces": False,
        **({"legacy": settings.legacy} if is_pieces else {}),
        **({} if templates is None else {"chat_template": templates}),
    }
