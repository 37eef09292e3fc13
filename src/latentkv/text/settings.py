"""What the small JSON files beside a tokenizer say: special tokens, BOS habits, stop ids, chat templates."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken

from latentkv.errors import TokenizerError
from latentkv.json_files import read_json

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenizerSettings:
    """The settings of one checkpoint folder.

    Attributes:
        named_tokens: text of `bos_token`, `eos_token`, ... as far as the folder names them.
        added_tokens: tokens outside the base vocabulary by id, from `added_tokens_decoder`.
        special_tokens: texts of further tokens that are to be treated as special.
        add_bos: whether `add_bos_token` asks for BOS before texts.
        eos_ids: stop ids from `generation_config.json`.
        chat_templates: jinja sources by name; "default" is the ordinary one.
    """

    named_tokens: dict[str, str]
    added_tokens: dict[int, AddedToken]
    special_tokens: tuple[str, ...]
    add_bos: bool
    eos_ids: frozenset[int]
    chat_templates: dict[str, str]


def read_settings(folder: Path) -> TokenizerSettings:
    """Reads the settings with the precedence of `transformers`; files that are absent are empty.

    Raises:
        TokenizerError: a file is not UTF-8 JSON, or a field in it has the wrong type.
    """
    config = _read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # older checkpoints: then this file has the last word on special tokens
        config |= _read_json(folder / "special_tokens_map.json")
    try:
        return TokenizerSettings(
            named_tokens={name: _content(config[name]) for name in NAMED_TOKENS if config.get(name) is not None},
            added_tokens={
                int(token_id): _added_token(token)
                for token_id, token in cast(dict[str, Any], config.get("added_tokens_decoder") or {}).items()
            },
            special_tokens=tuple(
                _content(token)
                for key in ("additional_special_tokens", "extra_special_tokens")
                for token in cast(list[Any], config.get(key) or [])
            ),
            add_bos=bool(config.get("add_bos_token")),
            eos_ids=_ids(_read_json(folder / "generation_config.json").get("eos_token_id")),
            chat_templates=_chat_templates(folder, config),
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise TokenizerError(f"The tokenizer settings in {folder} are malformed: {error!r}.") from error


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, TokenizerError) if path.exists() or path.is_symlink() else {}


def _content(token: Any) -> str:
    """A token is written as its text or as a dict that holds it."""
    content = cast(dict[str, Any], token)["content"] if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise TypeError(f"a token must be text, not {content!r}")
    return content


def _added_token(token: dict[str, Any]) -> AddedToken:
    flags = {name: bool(token[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in token}
    return AddedToken(_content(token), special=bool(token.get("special")), **flags)


def _ids(value: Any) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(int(item) for item in (cast(list[Any], value) if isinstance(value, list) else [value]))


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates in files of their own replace those written into `tokenizer_config.json`."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        try:
            return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        except (OSError, ValueError) as error:
            raise TokenizerError(f"Cannot read the chat templates in {folder}: {error}.") from error
    inline = config.get("chat_template")
    if inline is None:
        return {}
    if isinstance(inline, str):
        return {"default": inline}
    if isinstance(inline, dict):
        return {str(name): str(source) for name, source in cast(dict[Any, Any], inline).items()}
    return {str(entry["name"]): str(entry["template"]) for entry in cast(list[dict[str, Any]], inline)}
