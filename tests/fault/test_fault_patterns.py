"""docs/reliability.md, line 22: regular expressions of a checkpoint that never end are ended, and others go on."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

import latentkv
from latentkv.errors import CheckpointError, TokenizerError
from latentkv.text import encoding_process, load_tokenizer
from latentkv.text.tokenizer import Tokenizer
from latentkv.weights.files.compressed_config import PackedSchemes
from latentkv.weights.files.patterns import MAX_PATTERN, MAX_PATTERNS, match_patterns
from latentkv.weights.formats import INT4
from latentkv.weights.policy import WeightScheme
from worker_processes import worker_processes

EMBEDDED = Path(latentkv.__file__).parent / "assets" / "default" / "tokenizer.json"

# Each attempt of the library to match stays below its own limit, 10 million steps; there are 2,000 of them.
CUBIC, LONG = "a*a*$", "a" * 2000 + "b"
TOO_MANY = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 30}


def tokenizer(folder: Path, pattern: str, **parts: Any) -> Tokenizer:
    content = json.loads(EMBEDDED.read_text(encoding="utf-8"))
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}
    (folder / "tokenizer.json").write_text(json.dumps(content | parts), encoding="utf-8")
    return load_tokenizer(folder)


def workers() -> set[int]:
    return worker_processes("encoding_worker.py")


def test_line_22_a_pattern_that_does_not_end_is_ended_and_the_next_text_is_encoded(tmp_path: Path) -> None:
    hostile = tokenizer(tmp_path, CUBIC)
    before = workers()
    ids = hostile.encode("It was a dark night")
    with pytest.raises(
        TokenizerError, match=r"takes more than 1\.0 s: shorten the text, or change the pattern 'a\*a\*\$'"
    ):
        hostile.encode(LONG)
    assert hostile.encode("It was a dark night") == ids
    assert len(before) == len(workers()) == 1
    assert workers() != before


@pytest.mark.parametrize(
    "pattern", ["((a{1000}){1000}){1000}", "(?:" * 800 + "a" + ")+?" * 800, "(" * 9000 + ")" * 9000]
)
def test_line_22_a_pattern_that_is_large_when_compiled_takes_no_memory_here(tmp_path: Path, pattern: str) -> None:
    before = psutil.Process().memory_info().rss
    with suppress(TokenizerError):
        tokenizer(tmp_path, pattern).encode("aaa")
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_line_22_a_pattern_that_is_none_is_told_when_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(
        TokenizerError, match=r"cannot be read \(.+\): change the pattern '\(\(' in its tokenizer\.json"
    ):
        tokenizer(tmp_path, "((")


def test_line_22_a_search_that_the_library_gives_up_is_one_sentence(tmp_path: Path) -> None:
    hostile = tokenizer(tmp_path, "(x+x+)+y")
    with pytest.raises(TokenizerError, match=r"cannot encode this text \(.+\): change the pattern .+, or the text\.$"):
        hostile.encode("x" * 60)
    assert hostile.encode("ok")


def test_line_22_replacements_that_multiply_are_ended(tmp_path: Path) -> None:
    growing = tokenizer(tmp_path, ".", normalizer={"type": "Sequence", "normalizers": [TOO_MANY] * 8})
    before = psutil.Process().memory_info().rss
    with pytest.raises(TokenizerError, match="change replacements that make a text more than 64 times as long"):
        growing.encode("aaa")
    assert psutil.Process().memory_info().rss - before < 64 << 20
    assert growing.encode("bcd")


def test_line_22_spaces_do_not_stop_a_tokenizer_as_deepseek_v2_has_it(tmp_path: Path) -> None:
    published = tokenizer(tmp_path, r"\s+$")
    with pytest.raises(TokenizerError, match=r"takes more than 1\.3 s: shorten the text"):
        published.encode(" " * 100_000 + "1")
    assert published.decode(published.encode("  1")) == "  1"


def test_line_22_others_are_served_while_a_text_takes_its_time(tmp_path: Path, monkeypatch: Any) -> None:
    hostile = tokenizer(tmp_path, CUBIC)
    idle = workers()
    monkeypatch.setattr(encoding_process, "ENCODE_SECONDS", 300.0)
    with ThreadPoolExecutor(1) as pool:
        bomb = pool.submit(hostile.encode, LONG)
        while not psutil.Process(*idle).cpu_times().user > 0.2:
            time.sleep(0.001)
        assert hostile.encode("ok")
        assert not bomb.done()
        os.kill(*idle, signal.SIGKILL)
        with pytest.raises(TokenizerError, match="ended its process"):
            bomb.result()
    assert hostile.encode("ok")


# Six runs of 94 characters share them in 1.4 billion ways.
SLOW_TARGET, SLOW_NAME = "re:.*.*.*.*.*.*!", "model." + "x" * 94


@pytest.mark.parametrize("key", ["ignore", "targets"])
def test_line_22_a_target_that_does_not_end_is_ended(key: str) -> None:
    config: dict[str, Any] = {
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}},
    }
    (config if key == "ignore" else config["config_groups"]["group_0"])[key] = [SLOW_TARGET, "lm_head"]
    with pytest.raises(
        CheckpointError, match=r"has the pattern '\.\*.+!', which takes too much time .+: write it without"
    ):
        PackedSchemes(config, [SLOW_NAME])
    (config if key == "ignore" else config["config_groups"]["group_0"])[key] = [r"re:.*\.x+$", "lm_head"]
    schemes = PackedSchemes(config, [SLOW_NAME, "lm_head", "y"])
    if key == "ignore":
        assert [schemes.ignores(name) for name in (SLOW_NAME, "lm_head", "y")] == [True, True, False]
    else:
        assert schemes.of(SLOW_NAME) == schemes.of("lm_head") == WeightScheme(INT4, 32)
        with pytest.raises(CheckpointError, match="y is stored packed, but no target"):
            schemes.of("y")


def test_line_22_all_patterns_together_have_one_limit() -> None:
    slow = [SLOW_TARGET.removeprefix("re:.*") + "!" * i for i in range(MAX_PATTERNS)]
    with pytest.raises(CheckpointError, match="takes too much time"):
        match_patterns(slow, [SLOW_NAME], "quantization_config")
    with pytest.raises(CheckpointError, match="has 1001 patterns"):
        match_patterns([f"a{i}" for i in range(MAX_PATTERNS + 1)], [SLOW_NAME], "quantization_config")


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("(", r"has '\(', which is no regular expression: missing \)"),
        ("a" * (MAX_PATTERN + 1), "has a pattern of 1001 characters"),
        ("(" * 499 + ")" * 499, None),
        ("(?:" * 200 + "a" + ")+" * 200, None),
        ("((a{1000}){1000}){1000}", None),
    ],
)
def test_line_22_a_pattern_that_cannot_be_compiled_is_one_sentence(pattern: str, sentence: str | None) -> None:
    before = psutil.Process().memory_info().rss
    raises: Callable[..., Any] = pytest.raises if sentence else lambda *_, **__: suppress(CheckpointError)
    with raises(CheckpointError, match=sentence):
        match_patterns([pattern], ["model.x"], "quantization_config")
    assert psutil.Process().memory_info().rss - before < 64 << 20
