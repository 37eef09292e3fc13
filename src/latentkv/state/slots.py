"""`SlotPool`: where recurrent states lie, those of running sequences and copies of them to go on from later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from latentkv.errors import CacheError
from latentkv.state.pages import PagePool


@dataclass(eq=False)
class Slot:
    """Where the recurrent state of a text's beginning lies, in all layers.

    Attributes:
        index: in the cache.
        num_tokens: tokens that the state has taken in. Further ones of the text may wait beside it (`RecurrentState`).
    """

    index: int
    num_tokens: int = 0


class SlotPool:
    """Slots that sequences hold, and snapshots in those that are free.

    A snapshot is a copy of a sequence's slot. It takes no room from sequences: its slot is free, and is used for
    something else when no other one is, the snapshot not used for longest first.

    Args:
        tensors: the memory, each [S, ...].
        num_slots: S.

    Attributes:
        on_copy: called with (from, to), the indices of two slots, when one is copied into the other: for memory of the
            same slots in other processes.
    """

    def __init__(self, tensors: Sequence[Tensor], num_slots: int) -> None:
        self.on_copy: Callable[[int, int], None] | None = None
        self._tensors = tensors
        self._pool = PagePool(num_slots)

    @property
    def num_slots(self) -> int:
        """Slots in all."""
        return self._pool.num_pages

    @property
    def free_slots(self) -> int:
        """Slots that no sequence holds; snapshots may lie there."""
        return self._pool.free_pages

    @property
    def num_snapshots(self) -> int:
        """Snapshots that there are."""
        return self._pool.kept_pages

    def allocate(self) -> Slot:
        """Take a slot for a sequence that begins.

        Raises:
            CacheError: sequences hold all of them.
        """
        if not self.free_slots:
            raise CacheError(
                f"the cache is full: sequences hold all {self.num_slots} slots for recurrent states; "
                "raise kv_cache_bytes, or use fewer sequences at once"
            )
        return Slot(*self._pool.allocate(1))

    def free(self, slot: Slot) -> None:
        """Let go of a sequence's slot."""
        self._pool.free([slot.index])

    def snapshot(self, slot: Slot, lost: Callable[[], None]) -> Slot | None:
        """Copy a sequence's slot into a free one, if there is one; `lost` is called when the copy is overwritten."""
        if not self.free_slots:
            return None
        copy = self.allocate()
        self._copy(slot, copy)
        self.keep(copy, lost)
        return copy

    def keep(self, slot: Slot, lost: Callable[[], None]) -> None:
        """Make a held slot a snapshot; `lost` is called when it is overwritten."""
        self._pool.keep(slot.index, lambda index: lost())
        self.free(slot)

    def resume(self, snapshot: Slot) -> Slot:
        """Take a slot for a sequence that goes on from a snapshot: the snapshot's own one where no other is free.

        Raises:
            CacheError: there is no such snapshot any more.
        """
        self._pool.share([snapshot.index])
        if not self.free_slots:
            lost = self._pool.drop(snapshot.index)
            if lost:
                lost(snapshot.index)
            return Slot(snapshot.index, snapshot.num_tokens)
        slot = self.allocate()
        self._copy(snapshot, slot)
        self.free(snapshot)  # used now: overwritten after the others
        return slot

    def touch(self, snapshot: Slot) -> None:
        """Count a snapshot as used now."""
        self._pool.share([snapshot.index])
        self.free(snapshot)

    def drop(self, snapshot: Slot) -> None:
        """Forget a snapshot; who kept it is not told."""
        self._pool.drop(snapshot.index)

    def check(self) -> None:
        """Prove that every slot is free xor held.

        Raises:
            CacheError: one is not.
        """
        self._pool.check()

    def copy_memory(self, source: int, target: int) -> None:
        """Copy what lies in one slot into another, by their indices."""
        for tensor in self._tensors:
            tensor[target].copy_(tensor[source])

    def _copy(self, source: Slot, target: Slot) -> None:
        self.copy_memory(source.index, target.index)
        if self.on_copy:
            self.on_copy(source.index, target.index)
        target.num_tokens = source.num_tokens
