"""Added tokens that are empty, twice, or far away are refused before a table of their size is made."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from folders_for_text_tests import deepseek

from latentkv.errors import TokenizerError
from latentkv.text.loading import load_tokenizer


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ({"300": {"content": ""}}, "gives the id 300 to an empty text"),
        ({"5000000": {"content": "zz"}}, "has the id 5,000,000, far beyond the 257 tokens"),
        ({"259": {"content": "s"}, "260": {"content": "s"}}, "gives two ids to the token 's'"),
        ({"7": {"content": "s"}}, "gives 's' the id 7, which is that of a rank"),
        ({"259": {"content": "<|reserved_token_300|>"}}, "names a token as reserved ones are named"),
    ],
)
def test_of_ranks(tmp_path: Path, added: dict[str, Any], said: str):
    lines = (base64.b64encode(bytes([byte])) + f" {byte}".encode() for byte in range(256))
    (tmp_path / "tiktoken.model").write_bytes(b"\n".join(lines))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(TokenizerError, match=said):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("token_id", "content", "said"), [(5_000_000, "zz", "far beyond"), (430, "", "an empty text")])
def test_of_a_tokenizer_json(tmp_path: Path, token_id: int, content: str, said: str):
    path = deepseek(tmp_path / "model") / "tokenizer.json"
    value = json.loads(path.read_text())
    value["added_tokens"].append({**value["added_tokens"][-1], "id": token_id, "content": content})
    path.write_text(json.dumps(value))
    with pytest.raises(TokenizerError, match=said):
        load_tokenizer(path.parent)
