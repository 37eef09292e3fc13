"""`tokenizer.json`, read for the `tokenizers` library, which is given nothing that it might not come back from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import tokenizers

from latentkv.errors import TokenizerError
from latentkv.files import read_bytes
from latentkv.json_files import INDEX_BYTES, parse_json
from latentkv.libraries import errors_as
from latentkv.text.added_tokens import require_added_token, require_near
from latentkv.text.foreign_steps import ForeignSteps, find_foreign_steps, require_known_decoder
from latentkv.text.mistral_pattern import fix_mistral_pattern
from latentkv.token_ids import read_token_id


def read_tokenizer_json(
    path: Path, fixed_for: dict[str, Any] | None = None
) -> tuple[tokenizers.Tokenizer, ForeignSteps | None]:
    """The tokenizer of a `tokenizer.json`, and the steps that are not for this process to do.

    Where they are not for any text, the tokenizer has neither normalizer nor pre-tokenizer.

    Args:
        path: of the file.
        fixed_for: the model's config.json, if Mistral's pattern is to be put right for it.

    Raises:
        TokenizerError: it cannot be read, or its decoder has a pattern that is not known.
    """
    stored = read_bytes(path, TokenizerError, INDEX_BYTES)
    content = parse_json(stored, str(path), TokenizerError)
    foreign = None
    if isinstance(content, dict):  # otherwise the library has a word to say
        known = cast("dict[str, Any]", content)
        _require_sizes(known, path)
        require_known_decoder(known, str(path))
        changed = fixed_for is not None and fix_mistral_pattern(known, fixed_for)
        foreign = find_foreign_steps(known)
        if foreign is not None and foreign.always:
            changed = True
            known |= {"normalizer": None, "pre_tokenizer": None}
        stored = json.dumps(known).encode() if changed else stored
    with errors_as(TokenizerError, f"Cannot read {path} as a tokenizer"):
        return tokenizers.Tokenizer.from_buffer(stored), foreign


def _require_sizes(content: dict[str, Any], path: Path) -> None:
    """Refuse added tokens that are empty or have ids far from all others, for which a table would be made."""
    added, model = content.get("added_tokens"), content.get("model")
    vocab = cast("dict[str, Any]", model).get("vocab") if isinstance(model, dict) else None
    if not isinstance(added, list) or not isinstance(vocab, dict | list):
        return  # the library has a word to say
    known = len(cast("list[Any]", vocab)) + len(cast("list[Any]", added))
    for token in cast("list[Any]", added):
        if isinstance(token, dict):
            entry = cast("dict[str, Any]", token)
            require_added_token(entry.get("id"), entry.get("content"), known, f"{path}: added_tokens")
    if isinstance(vocab, dict):
        for token, token_id in cast("dict[str, Any]", vocab).items():
            require_near(read_token_id(token_id, f"{path}: {token!r:.40}", TokenizerError), known, str(path))
