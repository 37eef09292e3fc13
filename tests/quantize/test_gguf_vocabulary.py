"""Tokenizers written into GGUF files give the same tokens, or are refused."""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf_checks import add_tokenizer, copied_tokenizer, save
from tokenizers import Regex, pre_tokenizers

from latentkv.checkpoint.gguf.tensors import GGUFTensors
from latentkv.errors import TokenizerError
from latentkv.llm_options import EMBEDDED_MODEL
from latentkv.models.config_reader import read_config
from latentkv.quantize.gguf import plan_gguf, write_gguf
from latentkv.quantize.gguf.merges import merges_of_ranks, scores_of_merges
from latentkv.quantize.gguf.vocabulary import vocabulary_metadata
from latentkv.text import load_tokenizer
from latentkv.text.decoders import BYTE_CHARACTERS
from latentkv.text.gguf_cutting import cutting_of
from latentkv.text.gguf_tokenizer import gguf_tokenizer

TEXT = "It's 1234567 o'clock,\n\n  said 'the' naïve man: 中文 don't</s><tool> x"
MERGES = (("1", "2"), ("12", "3"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("'", "t"), ("Ċ", "Ċ"))
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def splits(*patterns: str) -> list[Any]:
    return [*(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns), BYTES]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not change it. Of 320 tokens, whose tokenizers have fewer."""
    return save(tmp_path_factory.mktemp("model") / "source", eos_token_id=1)


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "source"))


def read_back(folder: Path, tmp_path: Path, pre: str | None = None) -> Any:
    write_gguf(plan_gguf(folder, "bf16", pre), tmp_path / "out.gguf")
    return load_tokenizer(tmp_path / "out.gguf"), GGUFTensors(tmp_path / "out.gguf").metadata


KINDS = {
    "gpt-2": ([pre_tokenizers.ByteLevel(add_prefix_space=False)], {}),
    "smollm": ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], {}),
    "llama-bpe": (splits(*cutting_of("llama-bpe").patterns), {"whole": True}),
    "chatglm-bpe": (splits(*cutting_of("chatglm-bpe").patterns), {}),
    "qwen2": (splits(*cutting_of("qwen2").patterns), {"nfc": True}),
    "deepseek-r1-qwen": (splits(*cutting_of("qwen2").patterns), {}),
    "deepseek-v3": (splits(*cutting_of("deepseek-v3").patterns), {}),
    "tekken": (splits(*cutting_of("tekken").patterns), {"whole": True}),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_byte_level_tokenizer_comes_back_with_the_name_of_its_cutting(
    name: str, folder: Path, tmp_path: Path
) -> None:
    steps, options = KINDS[name]
    original = load_tokenizer(add_tokenizer(folder, steps, MERGES, **options))
    found, metadata = read_back(folder, tmp_path)
    assert metadata["tokenizer.ggml.pre"] == name
    assert found.encode(TEXT) == original.encode(TEXT)
    marked = found.encode(TEXT, add_bos=False, allow_special=True)
    assert marked == original.encode(TEXT, add_bos=False, allow_special=True)
    assert found.decode(marked, skip_special=False) == original.decode(marked, skip_special=False)
    messages = [{"role": "user", "content": "hello"}]
    assert found.apply_chat_template(messages) == original.apply_chat_template(messages)
    assert found.adds_bos == original.adds_bos and found.eos_ids == original.eos_ids
    types, tool = metadata["tokenizer.ggml.token_type"], original.token_id("<tool>")
    assert (types[0], types[2], types[tool], types[-1]) == (3, 1, 4, 5)
    assert metadata["tokenizer.ggml.tokens"][-1] == "[PAD319]" and len(types) == 320


def test_digits_cut_one_by_one_are_deepseek_v2s_where_no_token_joins_them(folder: Path, tmp_path: Path) -> None:
    *others, _ = cutting_of("deepseek-llm").patterns
    steps = [*splits(*others)[:-1], pre_tokenizers.Digits(individual_digits=True), BYTES]
    add_tokenizer(folder, steps, MERGES[2:])
    assert read_back(folder, tmp_path)[1]["tokenizer.ggml.pre"] == "deepseek-llm"
    add_tokenizer(folder, steps, MERGES)
    with pytest.raises(TokenizerError, match="in a way that GGUF"):
        plan_gguf(folder, "bf16")


UNKNOWN = [
    (splits(r"\w+"), {}),
    (splits(*cutting_of("llama-bpe").patterns), {"nfc": True}),
    ([pre_tokenizers.ByteLevel(add_prefix_space=True)], {}),
    ([pre_tokenizers.Split(Regex(cutting_of("qwen2").patterns[0]), "removed"), BYTES], {"nfc": True}),
    ([BYTES], {}),
]


@pytest.mark.parametrize(("steps", "options"), UNKNOWN)
def test_a_cutting_without_a_name_is_refused_not_guessed(
    steps: list[Any], options: dict[str, bool], folder: Path, tmp_path: Path
) -> None:
    add_tokenizer(folder, steps, MERGES, **options)
    with pytest.raises(TokenizerError, match=r"GGUF \(llama.cpp\) has no name for: name the nearest way with --pre"):
        plan_gguf(folder, "bf16")
    found, metadata = read_back(folder, tmp_path, "gpt-2")
    assert metadata["tokenizer.ggml.pre"] == "gpt-2" and found.decode(found.encode("a b")) == "a b"
    assert vocabulary_metadata(folder, read_config(folder), "none").values == {"tokenizer.ggml.model": "no_vocab"}
    with pytest.raises(TokenizerError, match="'gpt-9', which is not known here"):
        plan_gguf(folder, "bf16", "gpt-9")


def test_another_cutting_than_the_tokenizers_own_is_told_of() -> None:
    config = read_config(EMBEDDED_MODEL)
    with pytest.raises(TokenizerError, match="in a way that GGUF"):
        vocabulary_metadata(EMBEDDED_MODEL, config)
    written = vocabulary_metadata(EMBEDDED_MODEL, config, "qwen2")
    assert written.notes == ("texts are cut as by qwen2: some become other tokens than the model's own",)
    text = "The whale\n\nsaid: it was a dark night, and the coachman’s horses"
    assert gguf_tokenizer(written.values).encode(text) == load_tokenizer(EMBEDDED_MODEL).encode(text)


def test_what_stands_around_a_text_and_cannot_be_said_is_refused(folder: Path) -> None:
    add_tokenizer(folder, KINDS["gpt-2"][0], MERGES)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    tool = next(token for token in content["added_tokens"] if token["content"] == "<tool>")
    special = {"id": "<tool>", "ids": [tool["id"]], "tokens": ["<tool>"]}
    single = [{"SpecialToken": {"id": "<tool>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": {"<tool>": special},
    }
    path.write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=r"around a text, which GGUF has no keys for: use --pre none"):
        plan_gguf(folder, "bf16")


def test_more_than_three_ends_are_told_of(folder: Path) -> None:
    add_tokenizer(folder, KINDS["gpt-2"][0], MERGES)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5, 6, 7]}))
    written = vocabulary_metadata(folder, read_config(folder))
    assert [written.values[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [1, 5, 6]
    assert len(written.notes) == 1 and "left out" in written.notes[0]


def train_sentencepiece(folder: Path, tmp_path: Path, **options: Any) -> None:
    (tmp_path / "text.txt").write_text("the whale and the harpooner saw the white whale again\n" * 40)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=290,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )


LLAMAS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def test_a_sentencepiece_model_comes_back_with_its_scores(folder: Path, tmp_path: Path) -> None:
    train_sentencepiece(folder, tmp_path, model_type="bpe", **LLAMAS)
    (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": True, "add_bos_token": True}))
    original = load_tokenizer(folder)
    found, metadata = read_back(folder, tmp_path)
    assert metadata["tokenizer.ggml.model"] == "llama" and metadata["tokenizer.ggml.add_bos_token"] is True
    for text in ("the white whale ✓", " the  whale", TEXT):
        assert found.encode(text) == original.encode(text)
    assert metadata["tokenizer.ggml.token_type"][0] == 2 and metadata["tokenizer.ggml.token_type"].count(6) == 256


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_type": "unigram"}, "unigram"),
        ({"model_type": "bpe"}, "gives other tokens than a GGUF file of it would"),
    ],
)
def test_sentencepiece_that_gguf_has_no_words_for_is_refused(
    options: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    train_sentencepiece(folder, tmp_path, **options)
    with pytest.raises(TokenizerError, match=f"{words}.*use --pre none"):
        plan_gguf(folder, "bf16")


def test_merges_of_a_sentencepiece_tokenizer_json_become_scores(folder: Path) -> None:
    data = Path(os.environ.get("LATENTKV_DATA", Path(__file__).parents[2] / "../shared/data"))
    if not (data / "stories260K").is_dir():
        pytest.skip(f"{data} holds no stories260K")
    copied_tokenizer(data / "stories260K", folder)
    config = read_config(data / "stories260K")
    found = gguf_tokenizer(vocabulary_metadata(folder, config).values)
    original = load_tokenizer(folder)
    for text in ("Once upon a time, there was a girl named Lily.", "  two spaces\n naïve ✓", "theythen"):
        assert found.encode(text) == original.encode(text)


def test_merges_that_no_scores_give_are_found_out() -> None:
    tokens, types = ["a", "b", "c", "ab", "bc", "abc"], [1] * 6
    assert scores_of_merges(["a b", "ab c", "b c", "a bc"], tokens, types) is None  # abc before bc and after it
    assert scores_of_merges(["a b", "b c", "ab c"], tokens, types) is None  # a bc makes abc, too
    scores = scores_of_merges(["a b", "b c", "ab c", "a bc"], tokens, types)
    assert scores is not None and scores[3] > scores[4] > scores[5] > scores[0] == scores[2]


def test_ranks_become_merges_that_lead_to_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    words = [b"th", b"the", b" the", b"in", b"ing", b"12", b"123", "中".encode()[:2], "中".encode()]
    ranks = [bytes([byte]) for byte in range(256)] + words
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    config = {"added_tokens_decoder": {"265": {"content": "[EOS]", "special": True}}, "eos_token": "[EOS]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    original = load_tokenizer(folder)
    found, metadata = read_back(folder, tmp_path)
    assert metadata["tokenizer.ggml.pre"] == "kimi-k2" and "th e" in metadata["tokenizer.ggml.merges"]
    assert found.encode(TEXT) == original.encode(TEXT)


def test_a_merge_is_what_a_token_became_before_it() -> None:
    pieces = [*BYTE_CHARACTERS.values(), "ab", "cd", "abcd", "bcd"]
    assert merges_of_ranks(pieces) == ["a b", "c d", "ab cd", "b cd"]
