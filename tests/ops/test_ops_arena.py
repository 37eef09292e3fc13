"""Memory of recorded calls: no two tensors that live share any, and what is given back is given out again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentkv.ops.native.arena import Arena, Lease

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8]


@given(data=st.data())
def test_tensors_that_live_keep_what_was_written_to_them(data: st.DataObject) -> None:
    arena = Arena()
    lease, alive, wanted = arena.lease(), [], []
    for step in range(data.draw(st.integers(1, 40))):
        if alive and data.draw(st.booleans()):
            at = data.draw(st.integers(0, len(alive) - 1))
            del alive[at], wanted[at]
        else:
            shape = data.draw(st.sampled_from([(1,), (3, 5), (0, 4), (17, 64), (300, 1000)]))
            tensor = lease.like(torch.empty(shape, dtype=data.draw(st.sampled_from(DTYPES))))
            alive.append(tensor.fill_(step % 100)[:1])  # a view is enough to keep it
            wanted.append((tensor.clone(), tensor.data_ptr()))
            del tensor
        for view, (expected, address) in zip(alive, wanted, strict=True):
            whole = view.as_strided(expected.shape, expected.stride())
            assert torch.equal(whole, expected)
            assert not whole.numel() or (address % 64, whole.data_ptr()) == (0, address)


def test_what_is_gone_is_given_out_again() -> None:
    arena = Arena()
    lease, like = arena.lease(), torch.empty(1000, 500)
    first = lease.like(like)
    size = arena.nbytes
    for _ in range(20):
        first = lease.like(like)
    assert arena.nbytes <= 2 * size  # the next is given out before the last is gone
    del first


def test_steps_that_grow_one_by_one_need_no_more_than_a_few_times_what_the_largest_does() -> None:
    arena = Arena()
    for rows in range(1, 257):
        lease = arena.lease()
        alive = [lease.like(torch.empty(rows, width)) for width in (2048, 576, 3072, 2048, 10944)]
    needed = sum(tensor.numel() * 4 for tensor in alive)
    assert arena.nbytes < 5 * needed


class Collected(list[tuple[int, int, int]]):
    """What is free, and whoever looks through it has garbage collected meanwhile."""

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        for part in super().__iter__():
            gc.collect()
            yield part


@pytest.fixture
def little_to_collect() -> Iterator[None]:
    """Collections look at what the test makes alone: what other tests have left is much more, and takes minutes."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("little_to_collect")
def test_garbage_that_is_collected_at_any_moment_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Arena().lease()
    kept: list[tuple[torch.Tensor, int]] = []
    join = Lease._join  # pyright: ignore[reportPrivateUsage]

    def joined(self: Lease) -> None:
        free = self._free  # pyright: ignore[reportPrivateUsage]
        self._free = [free[i] for i in range(len(free))]  # pyright: ignore[reportPrivateUsage]
        join(self)
        self._free = Collected(self._free)  # pyright: ignore[reportPrivateUsage]

    monkeypatch.setattr(Lease, "_join", joined)
    for i in range(40):
        cycle: list[object] = [lease.like(torch.empty(100 + i))]
        cycle.append(cycle)
        kept.append((lease.like(torch.empty(77)).fill_(i), i))
        del cycle  # it lies between others
        assert all((tensor == number).all() for tensor, number in kept)
    spans = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor, _ in kept)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))


def test_leases_give_out_the_same_memory_and_sizes_and_strides_are_kept() -> None:
    arena = Arena()
    one, other = (arena.lease().like(torch.empty(4, 6).T) for _ in range(2))
    assert one.data_ptr() == other.data_ptr()
    assert (one.shape, one.stride()) == ((6, 4), (1, 6))


def test_memory_outlives_its_arena() -> None:
    tensor = Arena().lease().like(torch.empty(50))
    assert torch.equal(tensor.fill_(3.0), torch.full((50,), 3.0))
