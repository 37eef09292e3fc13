"""JSON files that are damaged or hostile: one sentence of the type that the caller asks for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from latentkv.errors import CheckpointError, TokenizerError
from latentkv.json_files import MAX_DEPTH, parse_json, read_any_json, read_json


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expecting value"),
        ('{"a": 1,}', "double quotes"),
        ('{"a": 1} {}', "Extra data"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' comes twice"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": -Infinity}', "-Infinity is no JSON number"),
        ('{"a": 1e999}', "1e999 is too large"),
        ('{"a": -1e999}', "-1e999 is too large"),
        ('{"a": ' + "9" * 100_000 + "}", "a whole number of 100000 digits"),
        ("[" * 100_000, "nests too deeply"),
        ('{"a": ' * 100_000, "nests too deeply"),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "nests too deeply"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"\\uDC00": 1}', "half of a surrogate pair"),
        (b'{"a": "\xff"}', "no UTF-8 at byte 7"),
        (b"\x80\x04}q\x00.", "no UTF-8 at byte 0"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_wrong_is_said_in_one_sentence(text: str | bytes, said: str):
    with pytest.raises(TokenizerError) as caught:
        parse_json(text, "x.json", TokenizerError, remedy="write it anew")
    assert said in str(caught.value)
    assert str(caught.value).startswith("x.json is not valid JSON (")
    assert str(caught.value).endswith("): write it anew.")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (
            '{"model_max_length": 1000000000000000019884624838656}',
            {"model_max_length": 1000000000000000019884624838656},
        ),
        ('["\\ud83d\\ude00", "\\\\ud800", 1e308, -0.5, null]', ["😀", "\\ud800", 1e308, -0.5, None]),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), None),
        (b"\xef\xbb\xbf{}", {}),
        ("3", 3),
    ],
)
def test_everything_else_is_read_as_json_reads_it(text: str | bytes, value: object):
    found = parse_json(text, "x.json", TokenizerError)
    assert found == (json.loads(text) if value is None else value)


@pytest.mark.parametrize(
    ("text", "kind"),
    [("[]", "a list"), ("null", "null"), ("true", "true or false"), ('"a"', "a text"), ("3", "a number")],
)
def test_an_object_is_required(tmp_path: Path, text: str, kind: str):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert read_any_json(path, CheckpointError) == json.loads(text)
    with pytest.raises(CheckpointError, match=f"config.json holds no JSON object but {kind}: fetch"):
        read_json(path, CheckpointError)


def test_a_file_is_read_only_if_its_size_and_kind_allow(tmp_path: Path):
    path = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        read_json(path, CheckpointError)
    path.symlink_to("elsewhere.json")
    with pytest.raises(CheckpointError, match=r"config.json is a link to elsewhere.json, which is not there"):
        read_json(path, CheckpointError)
    path.unlink()
    path.write_bytes(b"{}" + b" " * 98)
    assert read_json(path, CheckpointError, most_bytes=100) == {}
    with pytest.raises(CheckpointError, match="has 100 bytes, more than the 99 that it may"):
        read_json(path, CheckpointError, most_bytes=99)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"config.json is no regular file"):
        read_json(path, CheckpointError)
    path.rmdir()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(CheckpointError, match="is a Git LFS pointer"):
        read_json(path, CheckpointError)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(Path("a\0b"), CheckpointError)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config.json is no regular file"):
        read_json(tmp_path / "config.json", CheckpointError)
