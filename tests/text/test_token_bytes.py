from collections.abc import Callable
from pathlib import Path

import folders_for_text_tests as folders
import pytest

from latentkv.errors import TokenizerError
from latentkv.text import load_tokenizer
from latentkv.text.token_bytes import token_bytes

Folder = Callable[[str], Path]
NAMES = ["deepseek", "llama3", "qwen", "llama2", "metaspace", "kimi"]


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_of_a_texts_tokens_are_those_of_the_text(tokenizer_folder: Folder, name: str) -> None:
    tokenizer = load_tokenizer(tokenizer_folder(name))
    content = token_bytes(tokenizer)
    for text in folders.TEXTS:
        ids = tokenizer.encode("x" + text, add_bos=False)
        # Decoders drop the space before a first word.
        assert b"".join(content[i] for i in ids).decode().removeprefix(" ") == tokenizer.decode(ids)


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_and_gaps_have_no_bytes_and_added_text_has(tokenizer_folder: Folder, name: str) -> None:
    tokenizer = load_tokenizer(tokenizer_folder(name))
    content = token_bytes(tokenizer)
    assert len(content) == tokenizer.vocab_size
    for token_id, each in enumerate(content):
        assert (each == b"") == (token_id in tokenizer.special_ids or tokenizer.piece(token_id) is None)
    think = tokenizer.token_id("<think>")
    assert think is None or content[think] == b"<think>"


def test_every_byte_can_be_written(tokenizer_folder: Folder) -> None:
    for name in NAMES:
        assert {bytes([byte]) for byte in range(256)} <= set(token_bytes(load_tokenizer(tokenizer_folder(name))))


def test_a_decoder_of_whole_texts_is_refused(tokenizer_folder: Folder) -> None:
    with pytest.raises(TokenizerError, match="structured output cannot be had"):
        token_bytes(load_tokenizer(tokenizer_folder("wordpiece")))
