"""A GGUF file's tokenizer, written as files, gives the same tokens here, in transformers and in sentencepiece."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from gguf_vocabulary import SENTENCES, TEXTS, metadata, scored, trained, vocabulary
from transformers import AutoTokenizer

from latentkv.errors import TokenizerError
from latentkv.text import Tokenizer, load_tokenizer
from latentkv.text.gguf_files import write_tokenizer_files
from latentkv.text.gguf_tokenizer import gguf_tokenizer

TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
MESSAGES = [{"role": "user", "content": "Hello"}]


def assert_alike(found: Tokenizer, expected: Tokenizer, texts: list[str]) -> None:
    for text in texts:
        for options in ({}, {"allow_special": True}, {"add_bos": False}):
            assert found.encode(text, **options) == expected.encode(text, **options), (text, options)
        ids = expected.encode(text)
        assert found.decode(ids) == expected.decode(ids)
    for name in ("bos_id", "eos_ids", "adds_bos", "special_ids", "added_ids"):
        assert getattr(found, name) == getattr(expected, name), name


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_byte_level_bpe_becomes_a_tokenizer_json(pre: str, adds_bos: bool, tmp_path: Path) -> None:
    tokens, _ = vocabulary()
    texts, types = [*tokens, "<|im_end|>", "<think>"], [3, 3, *[1] * (len(tokens) - 2), 3, 4]
    said = metadata(pre, tokens=texts, token_type=types, add_bos_token=adds_bos, eot_token_id=len(tokens))
    said["tokenizer.chat_template"] = TEMPLATE
    write_tokenizer_files(said, tmp_path)
    found, expected = load_tokenizer(tmp_path), gguf_tokenizer(said)
    assert_alike(found, expected, [*TEXTS, "", "a<think> b<|im_end|>c</s>"])
    assert found.eos_ids == {1, len(tokens)}
    assert found.apply_chat_template(MESSAGES) == "<s>user: Hello</s>" == expected.apply_chat_template(MESSAGES)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "a<think> b<|im_end|>c"]:
        assert theirs.encode(text) == expected.encode(text, allow_special=True), text
    assert theirs.apply_chat_template(MESSAGES, tokenize=False) == "<s>user: Hello</s>"


@pytest.mark.parametrize("dummy", [True, False])
def test_pieces_with_scores_become_a_tokenizer_model(dummy: bool, tmp_path: Path) -> None:
    said = scored(add_space_prefix=dummy)
    for key, more in (("tokens", "[PAD]"), ("scores", 0.0), ("token_type", 5)):
        said[f"tokenizer.ggml.{key}"] = [*said[f"tokenizer.ggml.{key}"], more]
    write_tokenizer_files(said, tmp_path)
    texts = [*SENTENCES[:3], "  two  spaces ", "🐋 中", "a<sep>b", "\n\ttab", "", "the</s>whale", "<0x41>"]
    found = load_tokenizer(tmp_path)
    for text in texts:
        for options in ({}, {"allow_special": True}, {"add_bos": False}):
            assert found.encode(text, **options) == gguf_tokenizer(said).encode(text, **options), (text, options)
    assert (found.bos_id, found.eos_ids, found.vocab_size) == (1, {2}, len(trained()))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert [theirs.id_to_piece(i) for i in range(len(theirs))] == said["tokenizer.ggml.tokens"][:-1]
    for text in texts if dummy else []:
        assert theirs.encode(text) == trained().encode(text), text


def test_several_templates_are_a_list_of_them(tmp_path: Path) -> None:
    said = scored() | {"tokenizer.chat_template": TEMPLATE, "tokenizer.chat_template.tool_use": "{{ tools }}"}
    write_tokenizer_files(said, tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]
    assert {entry["name"] for entry in written} == {"default", "tool_use"}
    assert load_tokenizer(tmp_path).apply_chat_template(MESSAGES) == "<s>user: Hello</s>"


def test_unused_pieces_between_others_are_refused(tmp_path: Path) -> None:
    said = scored()
    said["tokenizer.ggml.token_type"] = [2, 3, 3, 5, *said["tokenizer.ggml.token_type"][4:]]
    with pytest.raises(TokenizerError, match="unused pieces between others"):
        write_tokenizer_files(said, tmp_path)
    assert not list(tmp_path.iterdir())
