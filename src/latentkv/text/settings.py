"""What the small JSON files beside a tokenizer say: special tokens, BOS habits, stop ids, chat templates."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken

from latentkv.errors import TokenizerError
from latentkv.json_files import read_json
from latentkv.text.template_files import read_templates
from latentkv.token_ids import read_token_id, read_token_ids

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CONFIG, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"


@dataclass(frozen=True)
class TokenizerSettings:
    """The settings of one checkpoint folder.

    Attributes:
        named_tokens: text of `bos_token`, `eos_token`, `image_token`, ... as far as the folder names them.
        unnamed: names that a file says outright to have no token (`"bos_token": null`).
        added_tokens: tokens outside the base vocabulary by id.
        added_tokens_file: the file that lists them.
        special_tokens: named and further tokens that are special; those without an id get the next ones, in order.
        add_bos: whether `add_bos_token` asks for BOS before texts.
        add_eos: whether `add_eos_token` asks for EOS after texts.
        add_prefix_space: what the file of that key says, None if nothing.
        legacy: whether each text between special tokens is taken for the beginning of one, as older code did.
        tokenizer_class: the name of the class of `transformers` that read the files, None if it is not said.
        fix_mistral_regex: whether the files say that a known wrong pattern is to be replaced.
        eos_ids: stop ids from `generation_config.json`.
        chat_templates: jinja sources by name; "default" is the ordinary one.
    """

    named_tokens: dict[str, str] = field(default_factory=dict[str, str])
    unnamed: frozenset[str] = frozenset()
    added_tokens: dict[int, AddedToken] = field(default_factory=dict[int, AddedToken])
    added_tokens_file: str = _CONFIG
    special_tokens: tuple[AddedToken, ...] = ()
    add_bos: bool = False
    add_eos: bool = False
    add_prefix_space: bool | None = None
    legacy: bool = False
    tokenizer_class: str | None = None
    fix_mistral_regex: bool = False
    eos_ids: frozenset[int] = frozenset()
    chat_templates: dict[str, str] = field(default_factory=dict[str, str])

    def with_named_tokens(self, defaults: Mapping[str, str]) -> "TokenizerSettings":
        """These settings, and for names that the files leave open the tokens of the vocabulary's own kind."""
        given = self.named_tokens
        names = {
            name: given[name] if name in given else defaults[name]
            for name in NAMED_TOKENS
            if name in given or (name in defaults and name not in self.unnamed)
        }
        listed = {token.content: token for token in self.special_tokens}
        special = [listed.get(token, AddedToken(token, special=True)) for token in names.values()]
        return replace(self, named_tokens=names | given, special_tokens=(*special, *self.special_tokens))


def read_settings(folder: Path) -> TokenizerSettings:
    """Reads the settings with the precedence of `transformers`; files that are absent are empty.

    Raises:
        TokenizerError: a file is not UTF-8 JSON, or a field in it has the wrong type.
    """
    config = _read_json(folder / _CONFIG)
    legacy = "added_tokens_decoder" not in config
    special_map = _read_json(folder / _MAP) if legacy else {}  # then this file has the last word on special tokens
    merged = {key: (_CONFIG, value) for key, value in config.items()}
    merged |= {key: (_MAP, value) for key, value in special_map.items()}
    named = {
        key: _token(value, f"{file}: {key}")
        for key, (file, value) in merged.items()
        if key in NAMED_TOKENS and value is not None
    }
    named = {key: named[key] for key in NAMED_TOKENS if key in named}
    named |= _model_specific(merged)
    named = {key: token for key, token in named.items() if token.content}
    special = (*named.values(), *_further_tokens(config, special_map))
    names = {token.content for token in special}
    added = _added_tokens_json(folder, names) if legacy else _added_tokens_decoder(config, names)
    classes = merged.get("tokenizer_class", (_CONFIG, None))[1]
    if not isinstance(classes, str | None):
        raise TokenizerError(f"{_CONFIG}: tokenizer_class must be the name of a class, not {classes!r}.")
    return TokenizerSettings(
        named_tokens={key: token.content for key, token in named.items()},
        unnamed=frozenset(key for key, (_, value) in merged.items() if key in NAMED_TOKENS and value is None),
        added_tokens=added,
        added_tokens_file=_ADDED if legacy else _CONFIG,
        special_tokens=special,
        add_bos=_flag(config, "add_bos_token") or False,
        add_eos=_flag(config, "add_eos_token") or False,
        add_prefix_space=_flag(config, "add_prefix_space"),
        legacy=_flag(config, "legacy") or False,
        tokenizer_class=classes,
        fix_mistral_regex=_flag(config, "fix_mistral_regex") or False,
        eos_ids=frozenset(
            read_token_ids(
                _read_json(folder / "generation_config.json").get("eos_token_id"),
                "generation_config.json: eos_token_id",
                TokenizerError,
            )
        ),
        chat_templates=read_templates(folder, config, _read_json(folder / "chat_template.json")),
    )


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, TokenizerError) if path.exists() or path.is_symlink() else {}


def _flag(config: dict[str, Any], key: str) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise TokenizerError(f"{_CONFIG}: {key} must be true or false, not {value!r}.")
    return value


def _model_specific(merged: dict[str, tuple[str, Any]]) -> dict[str, AddedToken]:
    """Tokens with names of a model's own, such as `image_token`: keys of the file, or a dict of them."""
    found = {
        key: _token(value, f"{file}: {key}")
        for key, (file, value) in merged.items()
        if key.endswith("_token") and key not in NAMED_TOKENS and isinstance(value, str | dict)
    }
    for key in ("model_specific_special_tokens", "extra_special_tokens"):
        file, value = merged.get(key, (_CONFIG, None))
        if isinstance(value, dict):
            tokens = cast("dict[str, Any]", value)
            found |= {name: _token(token, f"{file}: {key}: {name}") for name, token in tokens.items()}
        elif value is not None and (key == "model_specific_special_tokens" or not isinstance(value, list)):
            raise TokenizerError(f"{file}: {key} must hold tokens, not {value!r:.60}.")
    return found


def _further_tokens(config: dict[str, Any], special_map: dict[str, Any]) -> Iterable[AddedToken]:
    """Tokens without names; the newer key stands for the older one."""
    for file, content in ((_CONFIG, config), (_MAP, special_map)):
        key = "extra_special_tokens" if content.get("extra_special_tokens") else "additional_special_tokens"
        tokens = content.get(key) or []
        if isinstance(tokens, dict) and key == "extra_special_tokens":
            continue
        if not isinstance(tokens, list):
            raise TokenizerError(f"{file}: {key} must be a list of tokens, not {tokens!r:.60}.")
        yield from (_token(token, f"{file}: {key}") for token in cast(list[Any], tokens))


def _added_tokens_decoder(config: dict[str, Any], special: set[str]) -> dict[int, AddedToken]:
    tokens = config["added_tokens_decoder"] or {}
    if not isinstance(tokens, dict):
        raise TokenizerError(f"{_CONFIG}: added_tokens_decoder must be an object of tokens by their ids.")
    found: dict[int, AddedToken] = {}
    for key, value in cast("dict[str, Any]", tokens).items():
        name = f"{_CONFIG}: added_tokens_decoder"
        if not (key.isascii() and key.isdecimal() and len(key) < 12):
            raise TokenizerError(f"{name} has the key {key!r:.40}, which is no token id.")
        if not isinstance(value, dict):
            raise TokenizerError(f"{name}: {key} must be an object with the token's content, not {value!r:.40}.")
        content = cast("dict[str, Any]", value)
        token = _token(content, f"{name}: {key}", special=bool(content.get("special")))
        token.special = token.special or token.content in special
        found[int(key)] = token
    return found


def _added_tokens_json(folder: Path, special: set[str]) -> dict[int, AddedToken]:
    """The older list of added tokens: ids by texts, special where another file names them so."""
    found: dict[int, AddedToken] = {}
    for content, value in _read_json(folder / _ADDED).items():
        token_id = read_token_id(value, f"{_ADDED}: {content!r:.40}", TokenizerError)
        if token_id is None:
            raise TokenizerError(f"{_ADDED}: {content!r:.40} must have a token id, not {value!r}.")
        if token_id in found:
            raise TokenizerError(f"{_ADDED} gives {found[token_id].content!r} and {content!r} the same id {token_id}.")
        found[token_id] = AddedToken(content, normalized=content not in special, special=content in special)
    return found


def _token(value: Any, name: str, *, special: bool = True) -> AddedToken:
    """A token is written as its text, or as an object with that and flags."""
    fields: dict[str, Any] = cast("dict[str, Any]", value) if isinstance(value, dict) else {"content": value}
    content = fields.get("content")
    if not isinstance(content, str):
        raise TokenizerError(f"{name} must be a token's text, not {value!r:.60}.")
    flags = {key: bool(fields[key]) for key in ("single_word", "lstrip", "rstrip", "normalized") if key in fields}
    return AddedToken(content, special=special, **flags)
