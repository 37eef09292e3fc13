"""Sums of several processes through shared memory: the same bits for all, and nobody waits for one that is gone."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from latentkv import kernels
from latentkv.errors import OpError
from latentkv.ops.native.arena import Arena
from latentkv.ops.native.recording import Recording
from latentkv.ops.native.shared_sum import PLACE_FLOATS, process_failed, process_lost
from local_team import local_sums, together

pytestmark = pytest.mark.skipif(kernels.extension is None, reason="the native kernels are not built")


def part(rank: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + rank))


def summed(parts: list[Tensor], residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """In float32, in the order of the ranks, rounded once."""
    whole = parts[0].clone()
    for other in parts[1:]:
        whole += other
    return (whole if residual is None else whole + residual.float()).to(dtype)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 7), (3, 2048), (40, 2048 + 3), (1, PLACE_FLOATS), (2, PLACE_FLOATS + 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.thin(meet=2)
def test_all_get_the_sum_in_the_order_of_ranks_rounded_once(
    count: int, shape: tuple[int, ...], dtype: torch.dtype, with_residual: bool
):
    sums = local_sums(count)
    parts = [part(rank, shape) for rank in range(count)]
    residual = part(99, shape).to(dtype) if with_residual else None
    expected = summed(parts, residual, dtype)
    for given in together(lambda rank: sums[rank].sum(parts[rank], residual, dtype), count):
        assert given.dtype == dtype
        assert torch.equal(given, expected)


def test_what_is_not_finite_stays_so():
    sums = local_sums(2)
    parts = [torch.tensor([float("nan"), float("inf"), 1.0]), torch.tensor([1.0, 1.0, float("-inf")])]
    for dtype in (torch.float32, torch.bfloat16):
        given = together(lambda rank, dtype=dtype: sums[rank].sum(parts[rank], None, dtype), 2)[0]
        assert given[0].isnan() and given[1:].tolist() == [float("inf"), float("-inf")]


@pytest.mark.parametrize("rounds", [400, pytest.param(100_000, marks=pytest.mark.slow)])
def test_sums_of_any_size_one_after_another_are_right_however_late_each_rank_is(rounds: int):
    count = 3
    sums = local_sums(count)

    def work(rank: int) -> int:
        sizes, late = random.Random(5), random.Random(rank)
        for i in range(rounds):
            kind, size = sizes.choice(["sum", "sum", "sum", "gather", "step"]), sizes.randint(1, 3000)
            if late.random() < 0.02:
                time.sleep(late.random() * 0.002)
            if kind == "step":
                told = torch.full((size,), i if rank == 0 else -1)
                sums[rank].end()
                sums[rank].begin()
                sums[rank].broadcast(told)
                assert bool((told == i).all())
            elif kind == "gather":
                own = torch.full((2, size + rank), float(rank * rounds + i))
                widths = [size, size + 1, size + 2]
                whole = sums[rank].gather(own, widths, wanted=rank == 0)
                if whole is not None:
                    for other, columns in enumerate(whole.split(widths, dim=1)):
                        assert bool((columns == other * rounds + i).all())
            else:
                mine = torch.arange(size, dtype=torch.float32) + i * (rank + 1)
                expected = torch.arange(size, dtype=torch.float32) * 3 + 6 * i
                assert torch.equal(sums[rank].sum(mine, None, torch.float32), expected)
        return rounds

    assert together(work, count) == [rounds] * count


@pytest.mark.parametrize(("rows", "widths"), [(1, (64, 32)), (3, (64, 64, 33)), (5, (PLACE_FLOATS // 2 + 1, 40))])
def test_a_gather_puts_what_each_has_side_by_side(rows: int, widths: tuple[int, ...]):
    sums, count = local_sums(len(widths)), len(widths)
    parts = [part(rank, (rows, width)) for rank, width in enumerate(widths)]
    first, *others = together(lambda rank: sums[rank].gather(parts[rank], widths, wanted=rank == 0), count)
    assert first is not None and torch.equal(first, torch.cat(parts, dim=1))
    assert others == [None] * (count - 1)


def test_messages_larger_than_a_place_arrive_whole():
    sums = local_sums(3)
    told = torch.arange(PLACE_FLOATS + 5)  # of 8 bytes

    def work(rank: int) -> Tensor:
        numbers = told.clone() if rank == 0 else torch.zeros_like(told)
        sums[rank].begin()
        sums[rank].broadcast(numbers)
        return numbers

    assert all(torch.equal(numbers, told) for numbers in together(work, 3))


def test_a_recorded_sum_is_taken_anew_of_what_lies_there_then():
    sums = local_sums(2)

    def work(rank: int) -> list[Tensor]:
        mine, residual = part(rank, (2, 64)), torch.ones(2, 64, dtype=torch.bfloat16)
        recording = Recording(Arena())
        with recording.record():
            out = sums[rank].sum(mine, residual, torch.bfloat16)
        given = [out.clone()]
        for seed in (1, 2):
            mine.copy_(part(rank, (2, 64), seed))
            recording.run()
            given.append(out.clone())
        return given

    expected = [
        summed([part(rank, (2, 64), seed) for rank in range(2)], torch.ones(2, 64), torch.bfloat16) for seed in range(3)
    ]
    for given in together(work, 2):
        assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


def test_a_rank_that_cannot_do_its_part_is_named_to_all_others_and_the_next_step_is_done():
    sums = local_sums(3)

    def work(rank: int) -> tuple[int, Tensor]:
        sums[rank].begin()
        if rank == 1:
            sums[rank].sum(torch.ones(4), None, torch.float32)
            sums[rank].fail(1)
        else:
            with pytest.raises(process_failed()):
                for _ in range(3):
                    sums[rank].sum(torch.ones(4), None, torch.float32)
            sums[rank].fail(sums[rank].culprit)
        sums[rank].begin()
        return sums[rank].culprit, sums[rank].sum(torch.full((4,), rank + 1.0), None, torch.float32)

    for rank, (culprit, whole) in enumerate(together(work, 3)):
        assert whole.tolist() == [6.0] * 4
        assert culprit == (-1 if rank == 1 else 1)


def test_a_process_that_ended_is_not_waited_for():
    ended = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    descriptor = os.pidfd_open(ended.pid)
    sums = local_sums(2, [-1, descriptor])
    threading.Timer(0.2, ended.kill).start()
    began = time.monotonic()
    with pytest.raises(process_lost()):
        sums[0].sum(torch.ones(4), None, torch.float32)
    assert sums[0].culprit == 1
    assert time.monotonic() - began < 20
    ended.wait()
    os.close(descriptor)


def test_who_waits_for_a_rank_that_is_given_up_waits_no_more():
    sums = local_sums(2)
    threading.Timer(0.1, sums[0].abandon).start()
    with pytest.raises(process_lost()):
        sums[0].begin()


def test_who_calls_something_else_fails_the_step_instead_of_adding_up_what_it_should_not():
    for calls in (
        lambda rank, sums: sums.sum(torch.ones(3 + 2 * rank), None, torch.float32),
        lambda rank, sums: sums.gather(torch.ones(1, 2), [2, 2], wanted=False) if rank else sums.end(),
        lambda rank, sums: [sums.sum(torch.ones(4), None, torch.float32) for _ in range(1 + rank)] and sums.end(),
    ):
        sums = local_sums(2)

        def work(rank: int, calls: Any = calls, sums: Any = sums) -> bool:
            sums[rank].begin()
            try:
                calls(rank, sums[rank])
            except process_failed():
                sums[rank].fail(rank)
                return True
            return False

        assert any(together(work, 2))


def test_a_rank_that_is_gone_is_noticed_by_those_that_wait_for_another():
    ended = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    descriptor = os.pidfd_open(ended.pid)
    sums = local_sums(3, [-1, -1, descriptor])
    threading.Timer(0.1, ended.kill).start()
    with pytest.raises(process_lost()):
        sums[1].begin()  # for the first one, which lives
    assert sums[1].culprit == 2
    ended.wait()
    os.close(descriptor)


def test_only_what_can_be_added_up_is_taken():
    (sums,) = local_sums(1)
    with pytest.raises(OpError, match="parts of sums are float32"):
        sums.sum(torch.ones(4, dtype=torch.bfloat16), None, torch.bfloat16)
    with pytest.raises(OpError, match="of the sizes of the sum"):
        sums.sum(torch.ones(4), torch.ones(3), torch.float32)
    with pytest.raises(OpError, match="gathered is float32"):
        sums.gather(torch.ones(1, 4).double(), [4], wanted=True)
    with pytest.raises(OpError, match="contiguous"):
        sums.broadcast(torch.ones(4, 4).T)


def test_numbers_that_do_not_lie_side_by_side_are_taken_as_they_are():
    sums = local_sums(2)
    parts = [part(rank, (40, 30)).T for rank in range(2)]
    wholes = together(lambda rank: sums[rank].sum(parts[rank], None, torch.float32), 2)
    assert torch.equal(wholes[0], parts[0] + parts[1])
    for _ in range(20):
        first, _ = together(lambda rank: sums[rank].gather(parts[rank], [40, 40], wanted=rank == 0), 2)
        assert first is not None and torch.equal(first, torch.cat(parts, dim=1))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_ranks_that_fail_at_random_stay_in_step_with_the_others(count: int):
    """In each step some rank may fail, anywhere: all learn of it, and the next step is right."""
    sums, steps = local_sums(count), 300

    def work(rank: int) -> list[int]:
        plan, late = random.Random(1), random.Random(rank)
        culprits: list[int] = []
        for step in range(steps):
            calls = plan.randint(1, 6)
            victim, at = plan.randrange(3 * count), plan.randrange(calls + 1)
            culprit = -1
            try:
                sums[rank].begin()
                for call in range(calls):
                    if late.random() < 0.01:
                        time.sleep(0.001)
                    if victim == rank and at == call:
                        raise MemoryError
                    size = plan.randint(1, 500) if call >= 0 else 0
                    whole = sums[rank].sum(torch.full((size,), float(step + call)), None, torch.float32)
                    assert bool((whole == count * (step + call)).all())
                if victim == rank and at == calls:
                    raise MemoryError
                sums[rank].end()
            except MemoryError:
                culprit = rank
                sums[rank].fail(rank)
            except process_failed():
                culprit = sums[rank].culprit
                sums[rank].fail(culprit)
            assert culprit == (victim if victim < count else -1)
            plan.seed(step)
            culprits.append(culprit)
        return culprits

    assert len({tuple(each) for each in together(work, count)}) == 1


def test_who_waits_long_sleeps():
    sums = local_sums(2)

    def work(rank: int) -> float:
        if rank == 1:
            time.sleep(1)
        began = time.thread_time()
        sums[rank].begin()
        return time.thread_time() - began

    waited, _ = together(work, 2)
    assert waited < 0.5
