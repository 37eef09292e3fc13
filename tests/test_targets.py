"""Folders are looked at before the work whose result they are to hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentkv.errors import CheckpointError
from latentkv.targets import require_folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


def test_a_new_folder_and_one_that_exists_are_taken_and_nothing_is_left_there(source: Path, tmp_path: Path) -> None:
    require_folder(tmp_path / "a" / "b", CheckpointError, apart=[("the source", source)])
    require_folder(source, CheckpointError)
    assert [path.name for path in tmp_path.iterdir()] == ["source"] and not list(source.iterdir())


def test_a_folder_that_is_read_is_not_written_to_whatever_it_is_called(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    for name in (source, tmp_path / "link", source / ".." / "source"):
        with pytest.raises(CheckpointError, match="is the source itself: name another folder"):
            require_folder(name, CheckpointError, apart=[("the source", source)])


def test_files_dead_links_and_names_that_no_folder_can_have_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dead").symlink_to(tmp_path / "gone")
    for name, words in (
        ("file", "is a file, not a folder"),
        ("file/below", "is a file, not a folder"),
        ("dead", "is a link that leads nowhere"),
        ("n" * 300, "cannot be written"),
    ):
        with pytest.raises(CheckpointError, match=words):
            require_folder(tmp_path / name, CheckpointError)


def test_a_place_where_nobody_can_write_is_refused() -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        require_folder(Path("/proc/latentkv"), CheckpointError)
