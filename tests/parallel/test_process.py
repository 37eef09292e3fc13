"""Which cores a process of several keeps to."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentkv.parallel.process import own_cores


def sockets(folder: Path, *lists: str) -> Path:
    for number, cores in enumerate(lists):
        (folder / f"node{number}").mkdir()
        (folder / f"node{number}" / "cpulist").write_text(f"{cores}\n")
    return folder


@pytest.mark.parametrize(
    ("lists", "size", "expected"),
    [
        # Hyperthreads are numbered behind the cores of all sockets.
        (("0-3,8-11", "4-7,12-15"), 2, [{0, 1, 2, 3, 8, 9, 10, 11}, {4, 5, 6, 7, 12, 13, 14, 15}]),
        (("0-1", "2-3", "4-5", "6-7"), 2, [{0, 1, 2, 3}, {4, 5, 6, 7}]),
        (("0-3", "4-7"), 4, [{0, 1}, {2, 3}, {4, 5}, {6, 7}]),
        (("0-3", ""), 2, [set(), set()]),  # a memory without cores
        (("0-7",), 2, [set(), set()]),  # the system knows as well where to put them
        (("0", "1"), 3, [set(), set(), set()]),
    ],
)
def test_a_process_keeps_to_the_cores_of_as_few_sockets_as_can_be(
    tmp_path: Path, lists: tuple[str, ...], size: int, expected: list[set[int]]
):
    nodes = sockets(tmp_path, *lists)
    assert [own_cores(range(16), rank, size, nodes) for rank in range(size)] == expected


def test_cores_that_it_may_not_have_count_for_nothing(tmp_path: Path):
    nodes = sockets(tmp_path, "0-3", "10-13")
    assert [own_cores({2, 3, 11, 12}, rank, 2, nodes) for rank in range(2)] == [{2, 3}, {11, 12}]
    assert own_cores({2, 3}, 0, 2, nodes) == set()


def test_a_machine_that_does_not_tell_is_left_as_it_is(tmp_path: Path):
    assert own_cores(range(8), 0, 2, tmp_path / "nowhere") == set()
