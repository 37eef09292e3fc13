import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentkv.checkpoint import identity
from latentkv.checkpoint.identity import weights_digest


def write(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def files(folder: Path) -> list[Path]:
    return [folder / "model.safetensors"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "model", a=torch.arange(1000.0), b=torch.ones(3))


def test_weights_are_what_their_bytes_are(folder: Path, tmp_path: Path):
    memo = tmp_path / "memo.json"
    digest = weights_digest(files(folder), memo)
    assert len(digest) == 32
    same = write(tmp_path / "same", a=torch.arange(1000.0), b=torch.ones(3))
    assert weights_digest(files(same), memo) == digest
    changed = torch.arange(1000.0)
    changed[777] += 1
    assert weights_digest(files(write(tmp_path / "tuned", a=changed, b=torch.ones(3))), memo) != digest


def test_weights_that_change_under_the_same_name_and_size_are_noticed(folder: Path, tmp_path: Path):
    memo = tmp_path / "memo.json"
    digest = weights_digest(files(folder), memo)
    path = folder / "model.safetensors"
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 64
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as tools that copy times do
    assert weights_digest(files(folder), memo) != digest


@pytest.mark.parametrize(
    "damaged",
    [
        b"[" * 100_000,
        b"\xff",
        b"[]",
        b"9" * 5000,
        b'{"\\ud800": [1, 2, 3, 4, "' + b"a" * 64 + b'"]}',
        "pipe",
        "folder",
        "link",
    ],
)
def test_line_23_a_memo_that_is_damaged_or_no_file_never_stops_the_start(folder: Path, tmp_path: Path, damaged):
    memo = tmp_path / "weights.json"
    if damaged == "pipe":
        os.mkfifo(memo)
    elif damaged == "folder":
        memo.mkdir()
    elif damaged == "link":
        memo.symlink_to(tmp_path / "missing")
    else:
        memo.write_bytes(damaged)
    assert weights_digest(files(folder), memo) == weights_digest(files(folder), tmp_path / "other.json")


def test_files_that_have_not_changed_are_not_read_again(folder: Path, tmp_path: Path, monkeypatch):
    memo = tmp_path / "memo.json"
    other = write(tmp_path / "other", a=torch.ones(5))
    digests = weights_digest(files(folder), memo), weights_digest(files(other), memo)

    def unexpected(*_):
        raise AssertionError("weights are read again")

    monkeypatch.setattr(identity.hashlib, "file_digest", unexpected)
    assert (weights_digest(files(folder), memo), weights_digest(files(other), memo)) == digests


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 3}', '{"x": [1, 2, 3, 4, 5]}'])
def test_a_memo_that_cannot_be_read_is_written_anew(folder: Path, tmp_path: Path, content: str):
    memo = tmp_path / "memo.json"
    digest = weights_digest(files(folder), memo)
    memo.write_text(content)
    assert weights_digest(files(folder), memo) == digest
    assert str(folder / "model.safetensors") in json.loads(memo.read_text())


def test_a_memo_that_cannot_be_written_costs_time_only(folder: Path, tmp_path: Path):
    assert weights_digest(files(folder), tmp_path / "missing" / "memo.json") == weights_digest(
        files(folder), tmp_path / "memo.json"
    )
