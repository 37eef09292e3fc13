"""What accidents do to a folder of prefixes, and what they do not do to those who ask."""

from __future__ import annotations

import http.client
import json
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Generator
from hashlib import sha256
from pathlib import Path

import pytest

from forked_program import ForkedProgram, run_forked
from latentkv import LLM
from latentkv.errors import CacheError
from latentkv.files import open_regular
from latentkv.state import StoreFolder
from live_server import Live, serving
from stored_models import GREEDY, MLA, PROMPT, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), MLA)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    return say(LLM(model))


def say(llm: LLM, prompt: list[int] = PROMPT) -> list[int]:
    return llm.generate(prompt, GREEDY)[0].token_ids


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def disk(tmp_path: Path) -> Generator[Path]:
    """A disk of 160 KiB: room for two pages and a bit."""
    path = tmp_path / "disk"
    path.mkdir()
    if not _mount("-t", "tmpfs", "-o", "size=160k,mode=700", "tmpfs", path):
        pytest.skip("this user may not mount a disk")
    yield path
    while os.path.ismount(path):
        subprocess.run(["umount", "--lazy", path], check=True)


def _mount(*arguments: object) -> bool:
    command = shutil.which("mount")
    return bool(command) and subprocess.run([command, *map(str, arguments)], capture_output=True).returncode == 0


def test_a_full_disk_is_told_once_and_what_was_stored_before_stays_whole(
    model: Path, expected: list[int], disk: Path, caplog
):
    llm = LLM(model, cache_dir=disk)
    for prompt in (PROMPT, PROMPT[::-1]):
        assert len(say(llm, prompt)) == len(expected)
    assert say(llm) == expected
    llm.close()
    (message,) = warnings_of(caplog)
    assert "No space left on device" in message
    assert len(list(disk.glob("*.page"))) == 2
    assert not list(disk.glob(".*"))
    again = LLM(model, cache_dir=disk)
    assert say(again) == expected
    assert again.engine.counters.store_hits == 128
    again.close()


def test_a_disk_that_becomes_read_only_is_read_and_told_of_once(model: Path, expected: list[int], disk: Path, caplog):
    first = LLM(model, cache_dir=disk)
    say(first)
    first.close()
    caplog.clear()
    running = LLM(model, cache_dir=disk)
    assert _mount("--bind", disk, disk) and _mount("-o", "remount,bind,ro", disk)
    assert say(running) == expected
    assert running.engine.counters.store_hits == 128
    running.close()
    (message,) = warnings_of(caplog)
    assert "Read-only file system" in message
    started = LLM(model, cache_dir=disk)
    assert started.store is not None and not started.store.writes
    assert say(started) == expected
    assert started.engine.counters.store_hits == 128
    started.close()
    assert len(warnings_of(caplog)) == 1


def test_files_that_may_not_grow_any_more_are_a_full_disk_too(model: Path, expected: list[int], tmp_path: Path):
    program = (
        "import resource, sys, torch\n"
        "from stored_models import GREEDY, PROMPT\n"
        "from latentkv import LLM\n"
        "torch.set_num_threads(1)\n"
        "llm = LLM(sys.argv[1], cache_dir=sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "print(*llm.generate(PROMPT, GREEDY)[0].token_ids)\n"
        "llm.close()\n"
    )
    code, said, warned = run_forked(program, model, tmp_path / "store")
    assert code == 0, warned
    assert [int(token) for token in said.split()] == expected
    assert warned.count("Pages cannot be written") == 1 and "File too large" in warned
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["lock", "secret", "weights.json"]


def test_a_folder_that_vanishes_while_it_serves_takes_nothing_with_it(
    model: Path, expected: list[int], tmp_path: Path, caplog
):
    folder = tmp_path / "store"
    first = LLM(model, cache_dir=folder)
    say(first)
    first.close()
    llm = LLM(model, cache_dir=folder)
    shutil.rmtree(folder)
    assert say(llm) == expected
    assert say(llm, PROMPT[::-1])
    llm.close()
    (message,) = warnings_of(caplog)
    assert f"Pages cannot be written to {folder}" in message
    assert not folder.exists()


@pytest.mark.parametrize(
    "seconds", [pytest.param(0.0, marks=pytest.mark.slow), 0.05, pytest.param(0.2, marks=pytest.mark.slow)]
)
def test_a_process_that_is_killed_while_it_writes_leaves_a_folder_that_can_be_used(
    model: Path, expected: list[int], tmp_path: Path, seconds: float
):
    program = (
        "import random, sys, torch\n"
        "from stored_models import GREEDY, PROMPT\n"
        "from latentkv import LLM\n"
        "torch.set_num_threads(1)\n"
        "llm = LLM(sys.argv[1], cache_dir=sys.argv[2])\n"
        "while True:\n"
        "    llm.generate(PROMPT, GREEDY)\n"
        "    llm.generate([random.randrange(3, 60) for _ in range(500)], GREEDY)\n"
    )
    with ForkedProgram(program, model, tmp_path) as process:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*.page"))) < 6:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(seconds)
    llm = LLM(model, cache_dir=tmp_path)
    assert llm.store is not None and llm.store.writes
    assert not list(tmp_path.glob(".*.partial"))
    assert say(llm) == expected
    assert llm.engine.counters.store_hits > 0
    llm.close()


def test_two_processes_in_one_folder_do_each_other_no_harm(model: Path, expected: list[int], tmp_path: Path):
    limit = 6 * 77_824  # six pages in whole blocks
    writer, reader = (LLM(model, cache_dir=tmp_path, cache_dir_bytes=limit) for _ in range(2))
    for number in range(4):
        assert say(writer) == say(reader) == expected
        others = [PROMPT[number + 1 :] + PROMPT[: number + 1] for _ in range(2)]
        assert say(writer, others[0]) == say(reader, others[1])
        if number == 2:
            writer.close()
        assert sum(path.stat().st_size for path in tmp_path.glob("*.page")) <= limit
    reader.close()
    writer.close()
    assert len(list(tmp_path.glob("*.page"))) == 6


KEYS = ("a-key-of-alice", "a-key-of-bob")


def ask(live: Live, key: str) -> None:
    connection = http.client.HTTPConnection(live.url.removeprefix("http://"), timeout=30)
    body = json.dumps({"prompt": PROMPT, "max_tokens": 3})
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    connection.request("POST", "/v1/completions", body, headers)
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    answer.read()
    connection.close()


def test_line_18_no_key_reads_what_another_has_stored_and_files_tell_nothing_of_keys(model: Path, tmp_path: Path):
    with serving(LLM(model, cache_dir=tmp_path), api_keys=KEYS) as live:
        ask(live, KEYS[0])
        live.llm.close()
    with serving(LLM(model, cache_dir=tmp_path), api_keys=KEYS) as live:
        counters = live.llm.engine.counters
        ask(live, KEYS[1])
        assert (counters.store_queries, counters.store_hits) == (256, 0)
        ask(live, KEYS[0])
        assert (counters.store_queries, counters.store_hits) == (512, 256)
        live.llm.close()
    salts = [sha256(key.encode()) for key in KEYS]  # see RequireKey
    traces = [trace for salt in salts for trace in (salt.digest(), salt.hexdigest().encode())]
    for path in tmp_path.iterdir():
        content = path.name.encode() + path.read_bytes()
        assert not any(trace in content for trace in (*map(str.encode, KEYS), *traces))


def test_metrics_tell_what_went_to_the_folder_and_came_back(model: Path, tmp_path: Path):
    for served, hits in ((0, 0.0), (1, 256.0)):
        with serving(LLM(model, cache_dir=tmp_path)) as live:
            ask(live, "unused")
            live.llm.close()
            text = live.server.metrics.text().decode()
        found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        label = '_total{model_name="small"}'
        assert float(found[f"latentkv:external_prefix_cache_queries{label}"]) == 256
        assert float(found[f"latentkv:external_prefix_cache_hits{label}"]) == hits
        assert (float(found[f"latentkv:cache_dir_written_bytes{label}"]) > 0) == (served == 0)
        assert float(found[f"latentkv:cache_dir_read_bytes{label}"]) == hits * live.llm.cache.bytes_per_token


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_line_23_a_folder_that_is_open_to_others_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(CacheError, match=f"open to other users.*chmod 700 {tmp_path}"):
        StoreFolder(tmp_path)
    tmp_path.chmod(0o700)
    StoreFolder(tmp_path)


def test_line_23_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(CacheError, match="belongs to another user"):
        StoreFolder(tmp_path)


def test_line_23_a_page_file_is_a_regular_file_and_nothing_else_is_waited_for(tmp_path: Path) -> None:
    folder = StoreFolder(tmp_path)
    names = [f"{i:016x}-{i:064x}.page" for i in range(4)]
    (tmp_path / names[0]).write_bytes(b"a page")
    os.mkfifo(tmp_path / names[1])
    (tmp_path / names[2]).symlink_to(tmp_path / names[0])
    (tmp_path / names[3]).mkdir()
    assert [file.name for file in folder.files()] == [names[0]]
    for name in names[1:]:
        with pytest.raises(OSError):
            open_regular(tmp_path / name)
    os.mkfifo(tmp_path / "lock")
    assert not folder.lock()
