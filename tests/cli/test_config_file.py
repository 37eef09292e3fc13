"""`serve --config`: keys are the flags' names, and what is said on the line counts for more."""

from __future__ import annotations

from typing import Any

import pytest

from latentkv.errors import ConfigError


@pytest.fixture
def asked(latentkv, tmp_path, monkeypatch):
    """The options that `serve` is about to load a model with, and its result where it does not come to that."""
    seen: dict[str, Any] = {}

    def load(options, *, end_seconds):
        seen.update(vars(options), end_seconds=end_seconds)
        raise ConfigError("enough")

    monkeypatch.setattr("latentkv.cli.serve.load_model", load)

    def run(text: str, *words: object):
        seen.clear()
        path = tmp_path / "serve.toml"
        path.write_text(text)
        result = latentkv("serve", "--config", path, "--port", 0, *words)
        assert result.exit_code == 2
        return seen or result.stderr

    return run


def test_keys_are_the_names_of_flags(asked):
    found = asked(
        'model = "there"\nkv_cache_bytes = "1MiB"\nctx-size = "2k"\nmax-num-seqs = 3\nno-packed-dir = true\n'
        "drain-seconds = 2.5\nint8-products = false\n"
    )
    assert (found["model"], found["kv_cache_bytes"]) == ("there", 1 << 20)
    assert (found["max_context"], found["max_running"]) == (2048, 3)
    assert (found["packed_dir"], found["int8_products"], found["end_seconds"]) == (None, False, 12.5)


def test_what_is_said_on_the_line_counts_for_more(asked):
    said = 'model = "there"\nmax-context = 512\nno-packed-dir = true\nkv-dtype = "fp8"\n'
    found = asked(said, "here", "-c", 1024, "--packed-dir", "kept")
    assert (found["model"], found["max_context"], str(found["packed_dir"])) == ("here", 1024, "kept")
    assert found["kv_dtype"] == "fp8"
    assert asked(said, "--model", "here")["model"] == "here"
    assert asked('packed-dir = "kept"', "--no-packed-dir")["packed_dir"] is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", "'prot' is no option of serve: do you mean port?"),
        ("zzz = 1", "'zzz' is no option of serve: it has activations, "),
        ("config = 'x'", "'config' is no option of serve"),
        ("log-prompts = 1", "log-prompts must be true or false, not 1."),
        ("max-open = true", "max-open must be a text or a number, or a list of such, not True."),
        ("[server]\nport = 1", "'server' is no option of serve"),
        ("port = ", "cannot be read"),
        ("max-context = 'much'", "--max-context: 'much' is not a number of tokens"),
    ],
)
def test_what_is_none_is_refused_by_name(asked, text, said):
    assert said in asked(text)


def test_a_file_that_is_not_there_is_refused(latentkv, tmp_path):
    refused = latentkv("serve", "--config", tmp_path / "none.toml")
    assert refused.exit_code == 2
    assert "none.toml cannot be read" in refused.stderr
