"""`vocab.json` and `merges.txt`: byte-level BPE in GPT-2's two files, which do not say how a text is cut."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from latentkv.errors import TokenizerError
from latentkv.json_files import INDEX_BYTES, read_json
from latentkv.libraries import errors_as
from latentkv.text.decoders import BYTE_CHARACTERS
from latentkv.text.known_patterns import QWEN2
from latentkv.text.settings import TokenizerSettings
from latentkv.token_ids import read_token_id

_END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class _Cutting:
    """How a class of `transformers` cuts a text, and the tokens that it names where the files name none."""

    pattern: str | None = None
    nfc: bool = False
    named_tokens: tuple[str, ...] = ()


_QWEN2 = _Cutting(QWEN2, nfc=True, named_tokens=("eos_token", "unk_token", "pad_token"))
# The two files alone are what `tokenizers` writes and reads as byte-level BPE with GPT-2's pattern.
_UNNAMED = _Cutting()
_CLASSES = {
    "GPT2Tokenizer": _Cutting(named_tokens=("bos_token", "eos_token", "unk_token")),
    "Qwen2Tokenizer": _QWEN2,
    "PreTrainedTokenizer": _UNNAMED,
    "TokenizersBackend": _UNNAMED,
}
_QWEN2_FAMILIES = ("qwen2", "qwen3")


def read_vocab_merges(
    folder: Path, settings: TokenizerSettings, model_type: str | None
) -> tuple[Tokenizer, TokenizerSettings]:
    """The tokenizer of a folder with `vocab.json` and `merges.txt`, and the settings with its class's own tokens.

    Args:
        folder: of the checkpoint.
        settings: of the folder.
        model_type: of the model, whose family may imply a class; None if it is not known.

    Raises:
        TokenizerError: a file is missing or damaged, or it cannot be told how such a tokenizer cuts text.
    """
    cutting = _cutting(folder, settings, model_type)
    vocab, merges = _read_vocab(folder / "vocab.json"), _read_merges(folder / "merges.txt")
    missing = [character for character in BYTE_CHARACTERS.values() if character not in vocab]
    if missing and cutting is _UNNAMED:
        raise TokenizerError(
            f"{folder / 'vocab.json'} is no byte-level vocabulary ({len(missing)} of 256 bytes are missing), and no "
            f"tokenizer_class says what else it is. {_remedy(folder)}"
        )
    with errors_as(TokenizerError, f"{folder / 'merges.txt'} does not fit the vocab.json beside it"):
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, dropout=None, fuse_unk=False))
    tokenizer.decoder = decoders.ByteLevel()
    prefix = settings.add_prefix_space or False
    if cutting.pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(cutting.pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
            ]
        )
    if cutting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer, settings.with_named_tokens(dict.fromkeys(cutting.named_tokens, _END_OF_TEXT))


def add_frame(tokenizer: Tokenizer, settings: TokenizerSettings) -> None:
    """Has BOS and EOS put around texts where the settings ask for them, once the tokens are known."""
    bos = settings.named_tokens.get("bos_token") if settings.add_bos else None
    eos = settings.named_tokens.get("eos_token") if settings.add_eos else None
    around = [token for token in (bos, eos) if token is not None]
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*([bos] if bos else []), "$A", *([eos] if eos else [])],
            special_tokens=[(token, cast(int, tokenizer.token_to_id(token))) for token in dict.fromkeys(around)],
        )


def _cutting(folder: Path, settings: TokenizerSettings, model_type: str | None) -> _Cutting:
    if model_type in _QWEN2_FAMILIES:
        return _QWEN2
    name = (settings.tokenizer_class or "TokenizersBackend").removesuffix("Fast")
    if name not in _CLASSES:
        raise TokenizerError(
            f"{folder} has vocab.json and merges.txt of a {settings.tokenizer_class}, which is not read here; "
            f"GPT2Tokenizer and Qwen2Tokenizer are. {_remedy(folder)}"
        )
    return _CLASSES[name]


def _remedy(folder: Path) -> str:
    return (
        f"Write its tokenizer.json with transformers.AutoTokenizer.from_pretrained('{folder}')"
        f".save_pretrained('{folder}')."
    )


def _read_vocab(path: Path) -> dict[str, int]:
    if not path.exists():
        raise TokenizerError(f"{path.parent} has merges.txt but no vocab.json: fetch both files.")
    tokens = read_json(path, TokenizerError, most_bytes=INDEX_BYTES)
    if not tokens:
        raise TokenizerError(f"{path} must be a JSON object of token ids by tokens, with at least one.")
    for token, token_id in tokens.items():
        if read_token_id(token_id, f"{path.name}: {token!r:.40}", TokenizerError) is None:
            raise TokenizerError(f"{path.name}: {token!r:.40} must have a token id, not {token_id!r}.")
    if len(set(tokens.values())) != len(tokens) or max(tokens.values()) >= 4 * len(tokens) + 1024:
        raise TokenizerError(f"{path} gives ids twice or far apart: it is damaged, or no vocabulary.")
    return tokens


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise TokenizerError(f"{path.parent} has vocab.json but no merges.txt: fetch both files.") from None
    except (OSError, ValueError) as error:
        raise TokenizerError(f"Cannot read {path} as text: {error}.") from error
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r")
        if not line or line.startswith("#version"):
            continue
        match line.split(" "):
            case [str(left), str(right)] if left and right:
                merges.append((left, right))
            case _:
                raise TokenizerError(f"{path}, line {number}, is no merge of two tokens: {line[:40]!r}.")
    return merges
