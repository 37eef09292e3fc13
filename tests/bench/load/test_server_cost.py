"""What serving costs is measured on a server that runs, and its event loop's time is that of its thread."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest

from latentkv.bench.load.server_cost import _loop_seconds, measure_server_cost
from latentkv.errors import RequestError
from latentkv.options import LLMOptions


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the time of a thread of another process")
def test_the_loops_time_is_that_of_a_process_first_thread_alone() -> None:
    def spin(seconds: float) -> None:
        begun = time.thread_time()
        while time.thread_time() - begun < seconds:
            pass

    thread = threading.Thread(target=spin, args=(0.3,))
    before = _loop_seconds(os.getpid())
    thread.start()
    thread.join()
    waited = _loop_seconds(os.getpid())
    spin(0.3)
    after = _loop_seconds(os.getpid())
    assert before is not None and waited is not None and after is not None
    assert waited - before < 0.2 < after - waited


def test_of_a_process_that_is_not_there_nothing_is_told() -> None:
    assert _loop_seconds(2**22 + 1) is None  # beyond the largest id that Linux gives


@pytest.mark.slow  # starts a server of its own, twice the time of loading a model
def test_every_level_has_a_row_with_the_speeds_of_both_and_the_loops_share() -> None:
    report = measure_server_cost(LLMOptions(), concurrency=(1, 3), new_tokens=8, rounds=2)
    assert [row.concurrency for row in report.rows] == [1, 3]
    for row in report.rows:
        assert row.generate > 0 and row.served > 0 and row.share == row.served / row.generate
        assert sys.platform != "linux" or (row.loop_ms is not None and row.loop_ms > 0)


@pytest.mark.parametrize("wrong", [{"concurrency": ()}, {"concurrency": (0,)}, {"new_tokens": 0}, {"rounds": 0}])
def test_numbers_out_of_range_are_refused_before_anything_is_loaded(wrong: dict) -> None:
    with pytest.raises(RequestError, match="at least 1"):
        measure_server_cost(LLMOptions("no such model"), **wrong)
