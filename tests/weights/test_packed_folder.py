"""The folder of packed weights: whose it is, how much it holds, and what processes that share it see."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from forked_program import ForkedProgram, run_forked
from latentkv.errors import CacheError
from latentkv.weights.packed_folder import NoRoomError, PackedFolder

POSIX = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of POSIX")


def key(number: int) -> bytes:
    return bytes([number]) * 32


def put(folder: PackedFolder, number: int, size: int = 1000) -> None:
    with folder.writing(key(number)) as writer:
        writer.add("w", torch.full((size,), number, dtype=torch.int32))


def kept(folder: PackedFolder) -> list[int]:
    return [int(file.path.name[:2], 16) for file in folder.files()]


@POSIX
def test_a_folder_and_its_files_are_its_owners_alone(tmp_path: Path) -> None:
    folder = PackedFolder(tmp_path / "a" / "b")
    put(folder, 1)
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert [file.path.stat().st_mode & 0o777 for file in folder.files()] == [0o600]


@POSIX
@pytest.mark.parametrize("mode", [0o777, 0o722, 0o770, 0o702])
def test_a_folder_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(CacheError, match=r"can be written by other users.*chmod go-w"):
        PackedFolder(tmp_path)
    tmp_path.chmod(0o755)  # they may look
    PackedFolder(tmp_path)


@POSIX
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(CacheError, match="belongs to another user"):
        PackedFolder(tmp_path)


@POSIX
def test_a_file_that_others_could_have_written_is_not_used(tmp_path: Path) -> None:
    folder = PackedFolder(tmp_path / "p")
    put(folder, 1)
    assert folder.find(key(1)) is not None
    folder.files()[0].path.chmod(0o620)
    assert folder.find(key(1)) is None
    assert kept(folder) == []


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    folder, other = PackedFolder(tmp_path / "p"), PackedFolder(tmp_path / "other")
    put(other, 1)
    (folder.path / other.files()[0].path.name).symlink_to(other.files()[0].path)
    with pytest.raises(OSError):
        folder.find(key(1))


def test_those_used_last_stay(tmp_path: Path) -> None:
    folder = PackedFolder(tmp_path / "p", 40_000)
    for number in (1, 2, 3):
        put(folder, number, 2000)  # three pages each, and a table
        os.utime(folder.files()[-1].path, ns=(number, number))
    assert kept(folder) == [1, 2, 3]
    assert folder.find(key(1)) is not None  # which counts as a use
    assert kept(folder) == [2, 3, 1]
    put(folder, 4, 2000)
    assert kept(folder) == [3, 1, 4]
    assert sum(file.size for file in folder.files()) <= 40_000


def test_what_is_larger_than_the_folder_may_be_leaves_nothing(tmp_path: Path) -> None:
    folder = PackedFolder(tmp_path / "p", 30_000)
    put(folder, 1)
    with pytest.raises(NoRoomError, match="30,000"):
        put(folder, 2, 10_000)
    assert [path.name[:2] for path in folder.path.iterdir()] in ([], ["01"])
    assert folder.find(key(2)) is None


def test_a_file_is_replaced_without_room_for_two(tmp_path: Path) -> None:
    folder = PackedFolder(tmp_path / "p", 20_000)
    for _ in range(2):
        put(folder, 1, 3000)
    assert kept(folder) == [1]


def test_files_of_other_names_are_left_alone(tmp_path: Path) -> None:
    folder = PackedFolder(tmp_path / "p", 12_000)
    (folder.path / "notes.txt").write_bytes(bytes(50_000))
    put(folder, 1)
    put(folder, 2)
    assert kept(folder) == [2]
    assert (folder.path / "notes.txt").exists()


def test_writing_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    folder = PackedFolder(tmp_path / "p")
    put(folder, 1)
    with pytest.raises(RuntimeError), folder.writing(key(1)) as writer:
        writer.add("other", torch.zeros(9))
        raise RuntimeError
    assert len(list(folder.path.iterdir())) == 1
    found = folder.find(key(1))
    assert found is not None
    assert list(found.names) == ["w"]


def test_a_file_that_is_removed_stays_with_those_who_have_it(tmp_path: Path) -> None:
    folder = PackedFolder(tmp_path / "p")
    put(folder, 7)
    found = folder.find(key(7))
    assert found is not None
    folder.files()[0].path.unlink()
    assert bool((found.tensor("w", (1000,), torch.int32) == 7).all())


KILLED = """
import os, sys, torch
from pathlib import Path
from latentkv.weights.packed_folder import PackedFolder
with PackedFolder(Path(sys.argv[1])).writing(bytes([9]) * 32) as writer:
    writer.add("w", torch.zeros(1000))
    os._exit(1)
"""


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path: Path) -> None:
    folder = PackedFolder(tmp_path / "p")
    with folder.writing(key(1)) as writer:
        assert run_forked(KILLED, folder.path)[0] == 1
        assert len(list(folder.path.iterdir())) == 2
        put(folder, 2)  # while the first is still written
        assert sum(path.name.endswith(".partial") for path in folder.path.iterdir()) == 1
        writer.add("w", torch.ones(3))
    assert sorted(kept(folder)) == [1, 2]
    assert len(list(folder.path.iterdir())) == 2


RACER = """
import sys
from pathlib import Path
import torch
from latentkv.weights.packed_folder import PackedFolder
folder, key = PackedFolder(Path(sys.argv[1])), bytes([3]) * 32
print("ready", flush=True)
for _ in sys.stdin:
    with folder.writing(key) as writer:
        writer.add("w", torch.full((5000,), 3, dtype=torch.int32))
    found = folder.find(key)
    assert found is not None and bool((found.tensor("w", (5000,), torch.int32) == 3).all())
    print("whole", flush=True)
"""


def test_two_processes_that_write_the_same_both_find_it_whole(tmp_path: Path) -> None:
    with ForkedProgram(RACER, tmp_path / "p") as first, ForkedProgram(RACER, tmp_path / "p") as second:
        assert [racer.stdout.readline() for racer in (first, second)] == ["ready\n"] * 2
        for _ in range(5):
            for racer in (first, second):
                racer.stdin.write("go\n")
                racer.stdin.flush()
            assert [racer.stdout.readline() for racer in (first, second)] == ["whole\n"] * 2
    assert [path.name[:2] for path in (tmp_path / "p").iterdir()] == ["03"]
