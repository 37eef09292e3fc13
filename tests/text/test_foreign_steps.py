import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from folders_for_text_tests import CORPUS, TEXTS
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import AutoTokenizer

from latentkv.errors import TokenizerError
from latentkv.text import load_tokenizer
from latentkv.text.backends import SHORT
from latentkv.text.bpe_trainer import train_bpe
from latentkv.text.foreign_steps import find_foreign_steps
from latentkv.text.known_patterns import KIMI, KNOWN_PATTERNS, QWEN2, SLOW_PATTERNS, TEKKEN
from worker_processes import worker_processes

UNKNOWN = r"\w+|[^\w\s]|\s"
SLOW = next(iter(SLOW_PATTERNS))
SPECIAL = ["hi <s>you</s>", "a<note> b", " <mask>  x", "</s>", "<s> 😀 é ﬁ" * 3]
LONG = "ab 12 <s> the\u00a0fox  " * 400


@cache
def trained() -> str:
    tokenizer = train_bpe(CORPUS, 300, special_tokens=["<s>", "</s>"])
    tokenizer.add_tokens(["<note>", AddedToken("<mask>", lstrip=True), AddedToken("É", normalized=True)])
    return tokenizer.to_str()


def write(folder: Path, *patterns: str, **parts: Any) -> Path:
    """A folder whose tokenizer.json cuts by `patterns`; the library's own tokenizer of that is `stored`."""
    content = json.loads(trained())
    steps = content["pre_tokenizer"]["pretokenizers"]
    steps[:1] = [{**steps[0], "pattern": {"Regex": pattern}} for pattern in patterns]
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content | parts), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "extra_special_tokens": ["<end>"]}))
    return folder


def stored(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def workers() -> set[int]:
    return worker_processes("encoding_worker.py")


LOWER = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
UNKNOWN_NORMALIZER = {"type": "Replace", "pattern": {"Regex": "[é]+"}, "content": "e"}


@pytest.mark.parametrize(
    ("patterns", "parts"),
    [([UNKNOWN], {}), ([UNKNOWN], {"normalizer": LOWER}), ([QWEN2], {"normalizer": UNKNOWN_NORMALIZER})],
    ids=["pre-tokenizer", "both", "normalizer"],
)
def test_an_unknown_pattern_gives_the_ids_that_the_library_gives(
    tmp_path: Path, patterns: list[str], parts: dict[str, Any]
) -> None:
    folder = write(tmp_path / "t", *patterns, **parts)
    before = workers()
    ours, theirs = load_tokenizer(folder), stored(folder)
    assert workers() - before
    assert ours.vocab_size == theirs.get_vocab_size()
    for text in [*TEXTS, *SPECIAL, LONG, "", "ÉÉ é"]:
        for allow_special in (True, False):
            theirs.encode_special_tokens = not allow_special
            for frame in (True, False):
                ids = theirs.encode(text, add_special_tokens=frame).ids
                assert ours.encode(text, add_bos=None if frame else False, allow_special=allow_special) == ids, text
                assert ours.decode(ids, skip_special=False) == theirs.decode(ids, skip_special_tokens=False)


def test_many_threads_encode_at_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", UNKNOWN)
    ours, theirs = load_tokenizer(folder), stored(folder)
    texts = [f"fox {i} <s>" for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda text: ours.encode(text, allow_special=len(text) % 2 == 0), texts))
    for text, found in zip(texts, ids, strict=True):
        theirs.encode_special_tokens = len(text) % 2 != 0
        assert found == theirs.encode(text).ids


def test_a_known_pattern_is_one_that_the_library_reads_and_stays_in_this_process(tmp_path: Path) -> None:
    before = workers()
    for pattern in KNOWN_PATTERNS:
        folder = write(tmp_path / "t", pattern)
        tokenizer = load_tokenizer(folder)
        assert tokenizer.encode(LONG, allow_special=True) == stored(folder).encode(LONG).ids, pattern
    assert workers() == before


def test_line_ends_may_be_written_either_way(tmp_path: Path) -> None:
    before = workers()
    load_tokenizer(write(tmp_path / "t", QWEN2.replace(r"\r", "\r").replace(r"\n", "\n"), KIMI, TEKKEN)).encode(LONG)
    assert workers() == before


def test_a_slow_known_pattern_is_elsewhere_for_long_texts_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", SLOW)
    before = workers()
    ours, theirs = load_tokenizer(folder), stored(folder)
    assert ours.encode("a" + " " * (SHORT - 1)) == theirs.encode("a" + " " * (SHORT - 1)).ids
    assert workers() == before
    for text in ("a" + " " * SHORT, LONG + " \t 1  "):
        assert ours.encode(text, allow_special=True) == theirs.encode(text).ids
    assert len(workers() - before) == 1


def test_mistrals_pattern_is_put_right_in_place_of_one_that_nobody_knows(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", UNKNOWN)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"\0{i}": i for i in range(310, 100_311)}
    content |= {"post_processor": None, "added_tokens": content["added_tokens"][:2]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral", "transformers_version": "4.57.2"}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "fix_mistral_regex": True})
    )
    text = "'tt MyClass l'homme 123/x/\n"
    before = workers()
    assert load_tokenizer(folder).encode(text) == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert workers() == before


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a|a)*b"}}}, "the pattern '(a|a)*b'"),
        ({"pre_tokenizer": {"pattern": {"Regex": "(a|a)*b"}, "behavior": "Isolated"}}, "the pattern '(a|a)*b'"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": 7}}}, "the pattern 7"),
        ({"normalizer": replace({"String": "a" * 65}, "")}, "the pattern 'aaa"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [replace({"String": "a"}, "aaa")] * 4}},
            "replacements that make a text",
        ),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 64}}, "replacements that make a text"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 64}}, "more than 64 steps"),
    ],
)
def test_what_might_take_without_end_is_found_by_its_name(content: dict[str, Any], cause: str) -> None:
    found = find_foreign_steps(content)
    assert found is not None and found.always
    assert found.cause.startswith(cause)


def test_what_published_tokenizers_do_is_not_foreign() -> None:
    llama = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    albert = [replace({"String": "``"}, '"'), replace({"String": "''"}, '"'), replace({"Regex": " {2,}"}, " ")]
    for normalizer in (None, json.loads(llama.__getstate__()), {"type": "Sequence", "normalizers": albert}):
        assert find_foreign_steps({"normalizer": normalizer, "pre_tokenizer": None}) is None


def test_a_decoder_with_an_unknown_pattern_is_refused_by_name(tmp_path: Path) -> None:
    decoder = {"type": "Sequence", "decoders": [{"type": "Fuse"}, replace({"Regex": "(a|a)*b"}, "")]}
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: the decoder has the pattern '\(a\|a\)\*b'"):
        load_tokenizer(write(tmp_path / "t", QWEN2, decoder=decoder))
    decoder["decoders"][1] = replace({"Regex": " {2,}"}, " ")
    load_tokenizer(write(tmp_path / "t", QWEN2, decoder=decoder))
