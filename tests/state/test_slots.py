"""Slots of sequences and snapshots in those that are free."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentkv.errors import CacheError
from latentkv.state import KnownPage, PagePool, PrefixIndex, Slot, SlotPool


def pool_of(num_slots: int) -> tuple[SlotPool, torch.Tensor]:
    memory = torch.arange(2.0 * num_slots).view(num_slots, 2)
    return SlotPool([memory], num_slots), memory


def test_a_snapshot_is_a_copy_that_stays_until_its_slot_is_needed():
    pool, memory = pool_of(2)
    lost: list[str] = []
    slot = pool.allocate()
    slot.num_tokens = 5
    memory[slot.index] = 7.0
    snapshot = pool.snapshot(slot, lambda: lost.append("a"))
    memory[slot.index] = 8.0
    assert snapshot and snapshot.num_tokens == 5 and memory[snapshot.index].tolist() == [7, 7]
    assert (pool.free_slots, pool.num_snapshots) == (1, 1)
    pool.free(slot)
    again = pool.resume(snapshot)
    assert again.num_tokens == 5 and memory[again.index].tolist() == [7, 7] and not lost
    other = pool.allocate()
    assert other.index == snapshot.index and lost == ["a"] and pool.num_snapshots == 0
    assert pool.snapshot(other, lambda: None) is None
    with pytest.raises(CacheError, match="all 2 slots"):
        pool.allocate()
    pool.check()


def test_the_last_free_slot_is_gone_on_from_where_it_is():
    pool, memory = pool_of(2)
    lost: list[str] = []
    slot = pool.allocate()
    snapshot = pool.snapshot(slot, lambda: lost.append("a"))
    assert snapshot
    before = memory[snapshot.index].clone()
    taken = pool.resume(snapshot)
    assert taken.index == snapshot.index and torch.equal(memory[taken.index], before) and lost == ["a"]
    assert pool.free_slots == 0
    with pytest.raises(CacheError):
        pool.free(Slot(5))


def test_the_snapshot_not_used_for_longest_is_overwritten_first_and_a_dropped_one_before_all():
    pool, _ = pool_of(4)
    slot, lost = pool.allocate(), list[str]()
    first, second, third = (pool.snapshot(slot, lambda name=name: lost.append(name)) for name in "abc")
    assert first and second and third
    pool.touch(first)
    pool.drop(third)
    assert pool.allocate().index == third.index and not lost
    pool.allocate()
    pool.allocate()
    assert lost == ["b", "a"]


@given(st.lists(st.integers(0, 99), max_size=60), st.integers(1, 5))
def test_whatever_is_done_slots_are_held_or_free_and_snapshots_hold_what_was_copied(choices: list[int], size: int):
    pool, memory = pool_of(size)
    held: list[Slot] = []
    snapshots: dict[int, tuple[Slot, float]] = {}
    for number, choice in enumerate(choices):
        what, which = choice % 4, choice // 4
        if what == 0 and pool.free_slots:
            keys = list(snapshots)
            if which % 2 and keys:
                snapshot, value = snapshots[keys[which % len(keys)]]
                held.append(pool.resume(snapshot))
                assert memory[held[-1].index].tolist() == [value, value]
            else:
                held.append(pool.allocate())
            memory[held[-1].index] = float(number)
        elif what == 1 and held:
            pool.free(held.pop(which % len(held)))
        elif what == 2 and held:
            slot = held[which % len(held)]
            copy = pool.snapshot(slot, lambda number=number: snapshots.pop(number))
            if copy:
                snapshots[number] = copy, float(memory[slot.index, 0])
        elif what == 3 and snapshots:
            pool.drop(snapshots.pop(list(snapshots)[which % len(snapshots)])[0])
        pool.check()
        assert pool.free_slots == size - len(held) and pool.num_snapshots == len(snapshots)
        for snapshot, value in snapshots.values():
            assert memory[snapshot.index].tolist() == [value, value]


def known_text(index: PrefixIndex, pages: list[int]) -> list[KnownPage]:
    known: list[KnownPage] = []
    for i, page in enumerate(pages):
        known.append(index.add("", known[-1] if known else None, [i], page))
    return known


def test_a_prefix_is_found_up_to_its_last_snapshot_and_a_page_that_is_lost_takes_its_own_along():
    pages, (slots, _) = PagePool(4), pool_of(4)
    index = PrefixIndex(pages, 1, slots)
    slot, owned = slots.allocate(), pages.allocate(3)
    known = known_text(index, owned)
    assert index.find("", [0, 1, 2]) == []
    assert index.add_snapshot(known[1], slot) and not index.add_snapshot(known[1], slot)
    assert index.find("", [0, 1, 2]) == known[:2]
    assert index.add_snapshot(known[2], slot) and slots.num_snapshots == 2
    assert index.find("", [0, 1, 2]) == known
    pages.free(reversed(owned))
    pages.allocate(2)  # the unused page, and the last one of the text
    assert index.snapshot(known[2]) is None and slots.num_snapshots == 1
    assert not index.add_snapshot(known[2], slot)
    assert index.find("", [0, 1, 2]) == known[:2]
    index.drop_snapshot(known[1])
    assert index.find("", [0, 1, 2]) == [] and slots.num_snapshots == 0


def test_a_page_that_is_read_again_takes_the_place_of_one_that_nobody_holds():
    pages, (slots, _) = PagePool(4), pool_of(2)
    index = PrefixIndex(pages, 1, slots)
    owned = pages.allocate(2)
    known = known_text(index, owned)
    assert index.add_snapshot(known[1], slots.allocate())
    pages.free(reversed(owned[:1]))
    (again,) = pages.allocate(1)  # never the kept one while another is free
    assert again != owned[0]
    replaced = index.add("", None, [0], again)
    assert (replaced.id, replaced.page) == (known[0].id, again) and not index.holds(known[0])
    assert index.find("", [0, 1]) == [replaced, known[1]]
    assert index.add("", None, [0], owned[1]) is replaced  # while it is held
    pages.allocate(pages.free_pages)
    assert index.find("", [0, 1]) == [replaced, known[1]]
