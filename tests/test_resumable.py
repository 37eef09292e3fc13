"""Work in a folder goes on where it stopped, for who does the same work, one process at a time."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from forked_program import ForkedProgram
from latentkv.errors import CheckpointError
from latentkv.resumable import ResumableFolder, found_in


def folder_of(path: Path) -> ResumableFolder:
    return ResumableFolder(path, state=".working", report="report.json", last="config.json", what="copy")


def work(path: Path, *, mark: str = "mine", steps: int = 2, taken: list[str] | None = None) -> list[int]:
    """Take steps of which each finds out its number; the folder is finished by both."""
    folder = folder_of(path)
    known = folder.finished(mark, lambda report: report["found"])
    if known is not None:
        return known

    def make(name: str) -> int:
        if taken is not None:
            taken.append(name)
        return int(name)

    with folder.claimed(mark):
        found = [folder.step(f"{n}.json", lambda n=n: make(str(n)), int) for n in range(steps)]
        if steps == 2:
            (path / "report.json").write_text(json.dumps({"fingerprint": mark, "found": found}))
            folder.finish({"model": "a"})
    return found


def test_steps_are_taken_once_and_a_finished_folder_is_left_as_it_is(tmp_path: Path) -> None:
    taken: list[str] = []
    work(tmp_path / "out", steps=1, taken=taken)
    assert work(tmp_path / "out", taken=taken) == [0, 1]
    assert taken == ["0", "1"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "report.json"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert work(tmp_path / "out", taken=taken) == [0, 1] and taken == ["0", "1"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_what_is_found_in_the_folder_is_where_and_what_earlier_versions_wrote(tmp_path: Path) -> None:
    state = tmp_path / "out" / ".working"
    state.mkdir(parents=True)
    (state / "conversion.json").write_text('"mine"\n')
    (state / "0.json").write_text("7")
    assert work(tmp_path / "out") == [7, 1]


def test_who_was_killed_before_the_claim_was_written_begins(tmp_path: Path) -> None:
    (tmp_path / "out" / ".working").mkdir(parents=True)
    folder_of(tmp_path / "out").require_free()
    assert work(tmp_path / "out") == [0, 1]


def test_what_the_end_left_of_its_state_goes(tmp_path: Path) -> None:
    work(tmp_path / "out")
    (tmp_path / "out" / ".working").mkdir()
    (tmp_path / "out" / ".working" / "conversion.json").write_text('"mine"')
    assert work(tmp_path / "out") == [0, 1]
    assert not (tmp_path / "out" / ".working").exists()


def test_other_work_and_other_things_are_refused_and_stay(tmp_path: Path) -> None:
    work(tmp_path / "begun", steps=1)
    with pytest.raises(CheckpointError, match=r"begun holds an unfinished copy of another .*: remove it first$"):
        work(tmp_path / "begun", mark="another's")
    work(tmp_path / "done")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("done", "full", "file"):
        with pytest.raises(CheckpointError, match=rf"{name} exists and is not empty: name a new folder for the copy$"):
            work(tmp_path / name, mark="another's")
    for name, free in (("begun", True), ("done", True), ("new", True), ("full", False), ("file", False)):
        if free:
            folder_of(tmp_path / name).require_free()
        else:
            with pytest.raises(CheckpointError, match="exists and is not empty"):
                folder_of(tmp_path / name).require_free()
    assert not (tmp_path / "new").exists()


def test_what_is_damaged_is_one_sentence_that_names_it_and_the_remedy(tmp_path: Path) -> None:
    work(tmp_path / "out", steps=1)
    state = tmp_path / "out" / ".working"
    for name, damage in (("conversion.json", b'"min'), ("0.json", b""), ("0.json", b"[]"), ("0.json", b"[" * 100_000)):
        whole = (state / name).read_bytes()
        (state / name).write_bytes(damage)
        with pytest.raises(
            CheckpointError, match=rf"{name} is .*: remove the folder of the copy, and the same"
        ) as said:
            work(tmp_path / "out")
        assert "\n" not in str(said.value)
        (state / name).write_bytes(whole)
    assert work(tmp_path / "out") == [0, 1]
    (tmp_path / "out" / "report.json").write_text('{"fingerprint": "mine"}')
    with pytest.raises(CheckpointError, match=r"report.json is damaged \(it lacks 'found'\): remove the folder"):
        work(tmp_path / "out")


def test_a_disk_that_fails_is_one_sentence_and_what_was_done_stays(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "out")

    def fail() -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    said = r"out cannot be written \(No space left on device\): what is finished stays, the same command goes on$"
    with pytest.raises(CheckpointError, match=said), folder.claimed("mine"):
        folder.step("0.json", lambda: 0, int)
        folder.step("1.json", fail, int)
    assert sorted(path.name for path in folder.state.iterdir()) == ["0.json", "conversion.json"]


HOLDER = """
import sys
from pathlib import Path
from latentkv.errors import CheckpointError
from latentkv.resumable import alone_in
with alone_in(Path(sys.argv[1]), CheckpointError):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="folders are locked where POSIX is")
def test_one_process_at_a_time_writes_and_the_lock_ends_with_it(tmp_path: Path) -> None:
    work(tmp_path / "out", steps=1)
    with ForkedProgram(HOLDER, tmp_path / "out") as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="out is being written by another process: wait for its end"):
            work(tmp_path / "out")
    assert work(tmp_path / "out") == [0, 1]


def test_finished_work_is_found_by_all_that_identifies_it(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text('{"mark": "mine", "seed": 1, "loss": 0.5}')

    def found(**identity: object) -> object:
        return found_in(path, identity, lambda values: values, CheckpointError, "remove it")

    assert found(mark="mine", seed=1) == {"loss": 0.5}
    assert found(mark="mine", seed=2) is None and found(mark="mine", step=1) is None
    path.write_text("[]")
    with pytest.raises(CheckpointError, match=r"result.json holds no JSON object but a list: remove it\.$"):
        found(mark="mine")
    path.unlink()
    assert found(mark="mine") is None
