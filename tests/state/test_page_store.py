"""`PageStore`: what comes back is what went in, or nothing."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_cases import (
    BLOCK,
    PAGE,
    SPECS,
    bytes_on_disk,
    content,
    filled_cache,
    keys_of,
    load,
    open_store,
    page_files,
    save,
    wipe,
)

from forked_program import run_forked
from latentkv.errors import CacheError
from latentkv.state import PagedCache, StoreFolder
from latentkv.state.store import page_file, page_store

TEXT = [5, 9, 33, 7, 50, 2, 41, 18, 3, 3, 3, 60]  # three pages


@pytest.fixture
def cache() -> PagedCache:
    return filled_cache()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# What comes back


@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
def test_pages_come_back_byte_for_byte_also_into_other_pages_after_a_restart(specs, tmp_path: Path):
    cache = filled_cache(specs)
    first = open_store(tmp_path, cache)
    keys = keys_of(first, TEXT)
    assert all(save(first, key, page) > 0 for key, page in zip(keys, (3, 0, 5), strict=True))
    expected = [content(cache, page) for page in (3, 0, 5)]
    first.close()
    wipe(cache)
    second = open_store(tmp_path, cache)
    assert (second.num_pages, second.total_bytes) == (3, 3 * BLOCK)
    assert all(key in second for key in keys)
    assert load(second, keys_of(second, TEXT), [6, 7, 1]) == 3
    assert [content(cache, page) for page in (6, 7, 1)] == expected
    assert not any(any(part) for page in (0, 2, 3, 4, 5) for part in cache.page_parts(page))


def test_a_page_is_found_by_its_tokens_those_before_it_salt_model_format_and_page_size_alone(
    cache: PagedCache, tmp_path: Path
):
    own = open_store(tmp_path, cache)
    keys = keys_of(own, TEXT)
    for page, key in enumerate(keys):
        save(own, key, page)
    assert [key in own for key in keys_of(own, [*TEXT[:4], 50, 2, 41, 19])] == [True, False]
    assert [key in own for key in keys_of(own, [0, *TEXT[1:]])] == [False] * 3
    assert keys_of(own, TEXT[4:8])[0] not in own  # the same page at the beginning of a text
    assert [key in own for key in keys_of(own, TEXT, "alice")] == [False] * 3
    others = [
        open_store(tmp_path, cache, fingerprint=b"a fine-tune"),
        open_store(tmp_path, filled_cache(SPECS["fp16"])),
        open_store(tmp_path, PagedCache(cache.specs, 2, page_size=2 * PAGE)),
    ]
    for other in others:
        assert other.num_pages == 0
        assert other.total_bytes == 3 * BLOCK
        assert not any(key in other for key in keys_of(other, TEXT * 2))


def test_a_page_that_is_stored_is_not_written_again(cache: PagedCache, tmp_path: Path):
    own = open_store(tmp_path, cache)
    (key,) = keys_of(own, TEXT[:PAGE])
    assert save(own, key, 0) == page_files(tmp_path)[0].stat().st_size
    assert save(own, key, 1) == 0
    load(own, [key], [2])
    assert content(cache, 2) == content(cache, 0)


def test_a_page_whose_text_before_is_not_stored_is_not_stored(cache: PagedCache, tmp_path: Path):
    own = open_store(tmp_path, cache)
    first, second, third = keys_of(own, TEXT)
    assert save(own, second, 1) == 0
    assert save(own, first, 0) > 0
    assert save(own, third, 2) == 0
    assert len(page_files(tmp_path)) == 1


@pytest.mark.parametrize("answers", [[False], [True, False]])
def test_a_page_that_is_taken_for_something_else_meanwhile_is_not_stored(
    cache: PagedCache, tmp_path: Path, answers: list[bool]
):
    own = open_store(tmp_path, cache)
    (key,) = keys_of(own, TEXT[:PAGE])
    asked = iter(answers)
    assert own.save(key, 0, lambda: next(asked)) == 0
    assert next(asked, None) is None
    assert key not in own
    assert bytes_on_disk(tmp_path) == own.total_bytes == 0


def test_reading_ends_where_a_page_is_missing_or_not_wanted_any_more(cache: PagedCache, tmp_path: Path):
    own = open_store(tmp_path, cache)
    keys = keys_of(own, TEXT)
    for page, key in enumerate(keys):
        save(own, key, page)
    expected = [content(cache, page) for page in range(3)]
    wanted = iter([True, True, False])
    assert own.load(keys, [5, 6, 7], lambda: next(wanted)) == 2
    assert [content(cache, page) for page in (5, 6)] == expected[:2]
    own.path(keys[1]).unlink()
    assert load(own, keys, [5, 6, 7]) == 1
    assert [key in own for key in keys] == [True, False, True]


def test_no_file_stays_open(cache: PagedCache, tmp_path: Path):
    own = open_store(tmp_path, cache)
    keys = keys_of(own, list(range(PAGE * 8)))
    for page, key in enumerate(keys):
        save(own, key, page)
    page_files(tmp_path)[3].write_bytes(b"damaged")
    opened = Path("/proc/self/fd")
    before = len(list(opened.iterdir()))
    for _ in range(3):
        load(own, keys, list(range(8)))
        own.load(keys, list(range(8)), lambda: False)
    assert len(list(opened.iterdir())) == before


# What is not trusted


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one stored page, to copy."""
    folder = tmp_path_factory.mktemp("whole")
    own = open_store(folder, filled_cache())
    save(own, keys_of(own, TEXT[:PAGE])[0], 0)
    own.close()
    return folder


def damaged(whole: Path, tmp_path: Path, change) -> tuple[int, int, bool]:
    """Pages read from a copy whose file was changed, how often that was logged, whether the file is still there."""
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    (path,) = page_files(folder)
    path.write_bytes(change(path.read_bytes()))
    own = open_store(folder, filled_cache())
    (key,) = keys_of(own, TEXT[:PAGE])
    assert key in own
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    page_store.logger.addHandler(handler)
    try:
        read = load(own, [key], [1])
        assert read == 1 or (key not in own and own.total_bytes == 0)
        if read == 0:
            assert save(own, key, 0) > 0  # computed again, it is stored again
            assert load(own, [key], [1]) == 1
            path.write_bytes(b"again")
            assert load(own, [key], [1]) == 0
    finally:
        page_store.logger.removeHandler(handler)
        own.close()
    return read, len(logged), path.exists()


def test_the_file_that_is_damaged_below_is_read_while_it_is_whole(whole: Path, tmp_path: Path):
    assert damaged(whole, tmp_path, lambda data: data) == (1, 0, True)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255))
def test_no_byte_can_be_changed(whole: Path, tmp_path: Path, where: float, bits: int):
    def flip(data: bytes) -> bytes:
        index = int(where * len(data))
        return data[:index] + bytes([data[index] ^ bits]) + data[index + 1 :]

    assert damaged(whole, tmp_path, flip) == (0, 1, False)


HEAD = {"magic": 0, "version": 8, "tokens": 12, "size": 16, "before": 24, "token ids": 56, "state": 56 + 4 * PAGE}


@pytest.mark.parametrize("region", [*HEAD, "checksum"])
def test_every_field_is_compared(whole: Path, tmp_path: Path, region: str):
    def flip(data: bytes) -> bytes:
        index = HEAD.get(region, len(data) - 1)
        return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]

    assert damaged(whole, tmp_path, flip) == (0, 1, False)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(kept=st.floats(0, 1, exclude_max=True))
def test_a_file_that_ends_early_is_not_trusted(whole: Path, tmp_path: Path, kept: float):
    assert damaged(whole, tmp_path, lambda data: data[: int(kept * len(data))]) == (0, 1, False)


@pytest.mark.parametrize("more", [1, 4, 5000])
def test_nor_one_with_something_behind_it(whole: Path, tmp_path: Path, more: int):
    assert damaged(whole, tmp_path, lambda data: data + bytes(more)) == (0, 1, False)


@pytest.mark.parametrize("hole", [0.1, 0.5])
def test_nor_one_with_zeros_where_a_crash_lost_its_data(whole: Path, tmp_path: Path, hole: float):
    def lose(data: bytes) -> bytes:
        start = int(hole * len(data))
        return data[:start] + bytes(len(data) - start)

    assert damaged(whole, tmp_path, lose) == (0, 1, False)


@pytest.mark.parametrize("kind", ["text", "salt", "model", "format", "place"])
def test_a_file_under_anothers_name_is_not_trusted(cache: PagedCache, tmp_path: Path, kind: str, caplog):
    """Names are digests: whatever made two meet, what is inside decides."""
    own = open_store(tmp_path, cache)
    foreign = own
    if kind in ("model", "format"):
        specs, model = (cache.specs, b"a fine-tune") if kind == "model" else (SPECS["fp16"], b"a model")
        own.close()
        foreign = open_store(tmp_path, filled_cache(list(specs)), fingerprint=model)
    theirs = keys_of(foreign, TEXT[:PAGE], "alice" if kind == "salt" else "")
    if kind == "text":
        theirs = keys_of(foreign, [*TEXT[: PAGE - 1], 8])
    assert save(foreign, theirs[0], 0) > 0
    foreign.close()
    own = open_store(tmp_path, cache)
    keys = keys_of(own, TEXT)
    target = keys[0]
    if kind == "place":  # the same tokens, but after others
        assert keys[0] in own
        target = keys_of(own, TEXT[:PAGE] * 2)[1]
        load_from = [keys_of(own, TEXT[:PAGE] * 2)[0]]
        assert load(own, load_from, [1]) == 1
    (path,) = page_files(tmp_path)
    path.rename(own.path(target))
    own.close()
    again = open_store(tmp_path, cache)
    assert target in again
    assert load(again, [target], [2]) == 0
    assert len(warnings_of(caplog)) == 1
    assert page_files(tmp_path) == []


def test_damage_is_told_once_however_often_it_is_met(cache: PagedCache, tmp_path: Path, caplog):
    own = open_store(tmp_path, cache)
    keys = [keys_of(own, [number] * PAGE)[0] for number in range(5)]
    for key in keys:
        save(own, key, 0)
    for path in page_files(tmp_path):
        path.write_bytes(path.read_bytes()[:-1])
    assert [load(own, [key], [1]) for key in keys] == [0] * 5
    (message,) = warnings_of(caplog)
    assert "is damaged (its size is wrong)" in message


def test_a_file_that_cannot_be_read_is_told_once_and_left(cache: PagedCache, tmp_path: Path, caplog, monkeypatch):
    own = open_store(tmp_path, cache)
    keys = keys_of(own, TEXT)
    for key in keys:
        save(own, key, 0)

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(page_store, "read_page", broken)
    assert [load(own, [key], [1]) for key in keys] == [0] * 3
    (message,) = warnings_of(caplog)
    assert "cannot be read (Input/output error)" in message
    assert len(page_files(tmp_path)) == 3
    assert own.total_bytes == bytes_on_disk(tmp_path)  # they count as long as they are there
    monkeypatch.undo()
    assert load(own, keys, [1, 2, 3]) == 3


def test_a_damaged_file_that_cannot_be_removed_counts_as_long_as_it_is_there(cache, tmp_path: Path, monkeypatch):
    own = open_store(tmp_path, cache)
    (key,) = keys_of(own, TEXT[:PAGE])
    save(own, key, 0)
    own.path(key).write_bytes(b"damaged")

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert [load(own, [key], [1]) for _ in range(2)] == [0, 0]
    assert own.total_bytes == bytes_on_disk(tmp_path) == BLOCK


# How much there may be


def test_those_not_used_for_longest_go_first_and_of_a_text_its_end(cache: PagedCache, tmp_path: Path):
    own = open_store(tmp_path, cache, max_bytes=5 * BLOCK)
    old, new = keys_of(own, TEXT), keys_of(own, [60, *TEXT[1:8]])
    for key in [*old, *new]:
        assert save(own, key, 0) > 0
    own.touch(old)
    (other,) = keys_of(own, [1] * PAGE)
    assert save(own, other, 0) > 0
    assert [key in own for key in new] == [True, False]
    assert all(key in own for key in old)
    own.touch([other])
    own.touch(new)
    for number in range(2, 4):
        assert save(own, keys_of(own, [number] * PAGE)[0], 0) > 0
    assert [key in own for key in old] == [True, False, False]
    assert len(page_files(tmp_path)) == 5


def test_what_was_used_last_is_known_after_a_restart(cache: PagedCache, tmp_path: Path):
    own = open_store(tmp_path, cache)
    first, second = keys_of(own, TEXT), keys_of(own, [60] * 3 * PAGE)
    for key in [*first, *second]:
        save(own, key, 0)
    own.touch(first)
    own.close()
    own = open_store(tmp_path, cache, max_bytes=4 * BLOCK)
    assert [key in own for key in [*first, *second]] == [True, True, True, True, False, False]
    assert bytes_on_disk(tmp_path) == 4 * BLOCK


def test_a_text_longer_than_the_limit_keeps_its_beginning(cache: PagedCache, tmp_path: Path):
    own = open_store(tmp_path, cache, max_bytes=3 * BLOCK)
    keys = keys_of(own, list(range(6 * PAGE)))
    assert [save(own, key, 0) > 0 for key in keys] == [True, True, True, False, False, False]
    assert [key in own for key in keys] == [True, True, True, False, False, False]


def test_a_page_that_another_process_has_used_meanwhile_is_not_the_first_to_go(cache: PagedCache, tmp_path: Path):
    writer = open_store(tmp_path, cache, max_bytes=2 * BLOCK)
    (used,), (unused,) = keys_of(writer, [1] * PAGE), keys_of(writer, [2] * PAGE)
    save(writer, used, 0)
    save(writer, unused, 0)
    open_store(tmp_path, cache, max_bytes=2 * BLOCK).touch([used])
    assert save(writer, keys_of(writer, [3] * PAGE)[0], 0) > 0
    assert (used in writer, unused in writer) == (True, False)


def test_times_to_come_do_not_keep_files_for_ever(cache: PagedCache, tmp_path: Path):
    own = open_store(tmp_path, cache, max_bytes=2 * BLOCK)
    for number in range(2):
        save(own, keys_of(own, [number] * PAGE)[0], 0)
    for path in page_files(tmp_path):
        os.utime(path, (time.time() + 1e6, time.time() + 1e6))
    own.close()
    own = open_store(tmp_path, cache, max_bytes=2 * BLOCK)
    assert save(own, keys_of(own, [7] * PAGE)[0], 0) > 0


def test_files_of_other_names_are_neither_counted_nor_touched(cache: PagedCache, tmp_path: Path):
    open_store(tmp_path, cache).close()
    names = ["notes.txt", "a.page", ".x.page.partial", f"{'0' * 16}-{'1' * 63}.page"]
    for name in names:
        (tmp_path / name).write_bytes(bytes(10 * BLOCK))
    own = open_store(tmp_path, cache, max_bytes=BLOCK)
    assert own.total_bytes == 0
    assert save(own, keys_of(own, TEXT)[0], 0) > 0
    assert all((tmp_path / name).stat().st_size == 10 * BLOCK for name in names)


texts = st.lists(st.integers(0, 1), min_size=PAGE, max_size=5 * PAGE).map(lambda each: each[: len(each) // PAGE * PAGE])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    limit=st.integers(1, 6),
    work=st.lists(
        st.tuples(st.sampled_from(["save", "save", "load", "touch", "restart", "damage"]), texts), max_size=40
    ),
)
def test_the_limit_holds_at_all_times_and_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, limit: int, work: list[tuple[str, list[int]]], monkeypatch
):
    folder = tmp_path_factory.mktemp("store")
    cache = filled_cache(num_pages=2)
    own = open_store(folder, cache, max_bytes=limit * BLOCK)
    write = page_file.write_page

    def watched(file, key, parts) -> None:
        write(file, key, parts)
        assert bytes_on_disk(folder) <= limit * BLOCK

    with monkeypatch.context() as patch:
        patch.setattr(page_store, "write_page", watched)
        for what, text in work:
            keys = keys_of(own, text)
            if what == "restart":
                own.close()
                limit = max(limit - 1, 1)
                own = open_store(folder, cache, max_bytes=limit * BLOCK)
            elif what == "damage" and page_files(folder):
                page_files(folder)[0].write_bytes(b"x")
            for key in keys:
                if what == "save":
                    fill(cache, 0, key.digest)
                    save(own, key, 0)
                elif what == "load" and load(own, [key], [1]):
                    assert content(cache, 1) == filling(cache, key.digest)
            if what == "touch":
                own.touch(keys)
            known = [key in own for key in keys]
            assert bytes_on_disk(folder) <= own.total_bytes <= limit * BLOCK
            if what == "save":
                assert known == sorted(known, reverse=True), "an end is stored without its beginning"
    own.close()


def filling(cache: PagedCache, digest: bytes) -> bytes:
    size = len(content(cache, 0))
    return (digest * (size // len(digest) + 1))[:size]


def fill(cache: PagedCache, page: int, digest: bytes) -> None:
    left = filling(cache, digest)
    for part in cache.page_parts(page):
        part[:], left = left[: part.nbytes], left[part.nbytes :]


# Whose it is


def test_one_process_writes_the_others_read_and_one_of_them_writes_when_it_ends(cache: PagedCache, tmp_path: Path):
    first = open_store(tmp_path, cache)
    (key,) = keys_of(first, TEXT[:PAGE])
    save(first, key, 0)
    second = open_store(tmp_path, cache)
    assert (first.writes, second.writes) == (True, False)
    assert load(second, [key], [1]) == 1
    assert content(cache, 1) == content(cache, 0)
    (other,) = keys_of(second, [8] * PAGE)
    assert save(second, other, 2) == 0
    save(first, keys_of(first, [9] * PAGE)[0], 3)
    first.close()
    assert save(second, other, 2) > 0
    assert second.writes
    assert second.num_pages == 3  # what the first one wrote meanwhile is known now


def test_a_page_that_another_process_removes_is_a_page_that_is_not_stored(cache: PagedCache, tmp_path: Path, caplog):
    writer = open_store(tmp_path, cache)
    (key,) = keys_of(writer, TEXT[:PAGE])
    save(writer, key, 0)
    reader = open_store(tmp_path, cache)
    page_files(tmp_path)[0].unlink()
    assert load(reader, [key], [1]) == 0
    assert key not in reader
    assert warnings_of(caplog) == []


def test_the_lock_of_a_process_that_was_killed_is_free_and_what_it_left_half_written_is_removed(
    cache: PagedCache, tmp_path: Path
):
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from store_cases import *\n"
        "from latentkv.state.store import page_store\n"
        "own = open_store(Path(sys.argv[1]), filled_cache())\n"
        "save(own, keys_of(own, [1] * PAGE)[0], 0)\n"
        "def die(file, key, parts):\n"
        "    file.write(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "page_store.write_page = die\n"
        "save(own, keys_of(own, [2] * PAGE)[0], 0)\n"
    )
    assert run_forked(program, tmp_path)[0] == -9
    assert len(list(tmp_path.glob(".*.partial"))) == 1
    own = open_store(tmp_path, cache)
    assert own.writes
    assert list(tmp_path.glob(".*.partial")) == []
    assert load(own, keys_of(own, [1] * PAGE), [5]) == 1
    assert content(cache, 5) == content(cache, 0)
    assert keys_of(own, [2] * PAGE)[0] not in own


def test_salts_and_guesses_of_texts_leave_no_trace_in_names_or_files(cache: PagedCache, tmp_path: Path):
    salt = "sha256-of-somebody's-key"
    names: list[set[str]] = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        own = open_store(folder, cache)
        save(own, keys_of(own, TEXT[:PAGE], salt)[0], 0)
        save(own, keys_of(own, TEXT[:PAGE], "")[0], 0)
        for path in folder.iterdir():
            assert salt.encode() not in path.name.encode() + path.read_bytes()
        names.append({path.name for path in page_files(folder)})
    assert names[0].isdisjoint(names[1])  # keyed with each folder's own secret


def test_only_the_owner_may_look(cache: PagedCache, tmp_path: Path):
    folder = tmp_path / "new" / "store"
    own = open_store(folder, cache)
    save(own, keys_of(own, TEXT)[0], 0)
    assert folder.stat().st_mode & 0o077 == 0
    assert [path.stat().st_mode & 0o077 for path in folder.iterdir()] == [0] * 3


# What cannot be used


def test_a_page_that_cannot_be_written_leaves_nothing_and_the_next_one_is_stored(
    cache: PagedCache, tmp_path: Path, monkeypatch
):
    own = open_store(tmp_path, cache)
    first, second, _ = keys_of(own, TEXT)
    save(own, first, 0)

    def full(file, key, parts) -> None:
        file.write(bytes(100))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(page_store, "write_page", full)
        save(own, second, 1)
    assert second not in own
    assert bytes_on_disk(tmp_path) == own.total_bytes == BLOCK
    assert save(own, second, 1) > 0


def test_a_write_that_takes_a_part_is_gone_on_with(cache: PagedCache, tmp_path: Path, monkeypatch):
    class Slow(page_store.FileIO):
        def write(self, data) -> int:
            return super().write(memoryview(data)[:7])

        def readinto(self, data) -> int:
            return super().readinto(memoryview(data)[:5])

    monkeypatch.setattr(page_store, "FileIO", Slow)
    own = open_store(tmp_path, cache)
    (key,) = keys_of(own, TEXT[:PAGE])
    assert save(own, key, 0) == page_files(tmp_path)[0].stat().st_size
    assert load(own, [key], [1]) == 1
    assert content(cache, 1) == content(cache, 0)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_vanishes_gives_nothing_and_takes_nothing(cache: PagedCache, tmp_path: Path, replaced: bool):
    folder = tmp_path / "store"
    own = open_store(folder, cache)
    keys = keys_of(own, TEXT)
    save(own, keys[0], 0)
    folder.rename(tmp_path / "away")
    if replaced:  # by one that another process may have locked, with a secret of its own
        StoreFolder(folder).lock()
    with pytest.raises(FileNotFoundError):
        save(own, keys[1], 1)
    assert load(own, [keys[0]], [2]) == 0
    own.touch(keys)
    assert bytes_on_disk(folder) == 0 if replaced else not folder.exists()


def test_a_secret_that_is_not_whole_is_made_anew(cache: PagedCache, tmp_path: Path):
    own = open_store(tmp_path, cache)
    key = keys_of(own, TEXT)[0]
    save(own, key, 0)
    own.close()
    (tmp_path / "secret").write_bytes(b"short")
    own = open_store(tmp_path, cache)
    assert len((tmp_path / "secret").read_bytes()) == 32
    assert keys_of(own, TEXT)[0] not in own
    assert (own.num_pages, own.total_bytes) == (0, BLOCK)  # it counts, and goes when its time has come


def test_a_file_in_the_folders_place_a_limit_below_a_page_and_a_gpus_cache_are_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"file' cannot be used .*name a folder"):
        StoreFolder(tmp_path / "file")
    with pytest.raises(CacheError, match=r"cache_dir_bytes=4,095 holds no page: give at least 4,096"):
        open_store(tmp_path / "store", filled_cache(), max_bytes=BLOCK - 1)
    with pytest.raises(CacheError, match="device='cpu'"):
        open_store(tmp_path / "store", PagedCache(SPECS["bf16"], 1, device="meta"))
