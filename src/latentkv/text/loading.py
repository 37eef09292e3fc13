"""Which tokenizer a model has: the first of the files that say it all, and a true word about the others."""

from pathlib import Path
from typing import Any

from latentkv.checkpoint.gguf.tensors import GGUFTensors, is_gguf
from latentkv.errors import TokenizerError
from latentkv.json_files import read_json
from latentkv.text.backends import HuggingFaceBackend
from latentkv.text.gguf_tokenizer import gguf_tokenizer
from latentkv.text.settings import TokenizerSettings, read_settings
from latentkv.text.tokenizer import Tokenizer
from latentkv.text.tokenizer_json import read_tokenizer_json
from latentkv.text.vocab_merges import add_frame, read_vocab_merges

_SENTENCEPIECE = ("tokenizer.model", "spm.model", "spiece.model", "sentencepiece.bpe.model")
_UNREADABLE = {
    "tekken.json": "a tekken.json (Mistral's own format)",
    "vocab.txt": "a vocab.txt (WordPiece)",
}


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder or a GGUF file holds a tokenizer of a kind that `load_tokenizer` knows or can explain."""
    if is_gguf(folder):
        return GGUFTensors(folder).metadata.get("tokenizer.ggml.model", "no_vocab") != "no_vocab"
    names = ("tokenizer.json", "vocab.json", "merges.txt", *_UNREADABLE)
    # A dead link is no file, and yet somebody meant it to be there.
    there = any((folder / name).exists() or (folder / name).is_symlink() for name in names)
    return there or _ranks_file(folder) is not None or _sentencepiece_file(folder) is not None


def load_tokenizer(folder: Path) -> Tokenizer:
    """Reads the tokenizer of a folder or of a GGUF file.

    Of a folder, the first of `tokenizer.json`, `tiktoken.model` or one `*.tiktoken`, `tokenizer.model` (SentencePiece),
    and `vocab.json` with `merges.txt`.

    Raises:
        TokenizerError: there is none, it is damaged, or it is of a kind that must be converted first.
    """
    folder = Path(folder)
    if is_gguf(folder):
        return gguf_tokenizer(GGUFTensors(folder).metadata)
    settings = read_settings(folder)
    if _is_meant(folder / "tokenizer.json"):
        fixed_for = _config(folder) if settings.fix_mistral_regex else None
        tokenizer, foreign = read_tokenizer_json(folder / "tokenizer.json", fixed_for)
        return Tokenizer(HuggingFaceBackend(tokenizer, settings, foreign), settings)
    if (ranks_file := _ranks_file(folder)) is not None:
        return _tiktoken(ranks_file, settings)
    if (pieces_file := _sentencepiece_file(folder)) is not None:
        return _sentencepiece(pieces_file, settings)
    if _is_meant(folder / "vocab.json") or _is_meant(folder / "merges.txt"):
        return _vocab_merges(folder, settings)
    for name, what in _UNREADABLE.items():
        if _is_meant(folder / name):
            raise TokenizerError(
                f"{folder} has {what} and no tokenizer.json, which is what is read here: fetch the tokenizer.json of "
                f"the same model, or write one with transformers.AutoTokenizer.from_pretrained('{folder}')"
                f".save_pretrained('{folder}')."
            )
    raise TokenizerError(
        f"{folder} has no tokenizer: expected tokenizer.json, tiktoken.model, tokenizer.model, or vocab.json with "
        "merges.txt."
    )


def _tiktoken(path: Path, settings: TokenizerSettings) -> Tokenizer:
    from latentkv.text.tiktoken_backend import TiktokenBackend  # a slow import that few checkpoints need

    return Tokenizer(TiktokenBackend(path, settings), settings)


def _sentencepiece(path: Path, settings: TokenizerSettings) -> Tokenizer:
    from latentkv.text.sentencepiece_backend import SentencePieceBackend
    from latentkv.text.sentencepiece_model import read_sentencepiece_model

    model = read_sentencepiece_model(path)
    settings = settings.with_named_tokens(model.named_tokens)
    return Tokenizer(SentencePieceBackend(model, settings), settings)


def _vocab_merges(folder: Path, settings: TokenizerSettings) -> Tokenizer:
    model_type = _config(folder).get("model_type")
    tokenizer, settings = read_vocab_merges(folder, settings, model_type if isinstance(model_type, str) else None)
    backend = HuggingFaceBackend(tokenizer, settings)
    add_frame(tokenizer, settings)
    return Tokenizer(backend, settings)


def _config(folder: Path) -> dict[str, Any]:
    """The model's config.json; a damaged one is told of where the model is read."""
    try:
        return read_json(folder / "config.json", TokenizerError)
    except TokenizerError:
        return {}


def _ranks_file(folder: Path) -> Path | None:
    if _is_meant(folder / "tiktoken.model"):
        return folder / "tiktoken.model"
    others = sorted(folder.glob("*.tiktoken"))
    return others[0] if len(others) == 1 else None


def _sentencepiece_file(folder: Path) -> Path | None:
    for name in _SENTENCEPIECE:
        if _is_meant(folder / name):
            return folder / name
    versions = sorted(folder.glob("tokenizer.model.v*"))
    return versions[-1] if versions else None


def _is_meant(path: Path) -> bool:
    return path.exists() or path.is_symlink()
