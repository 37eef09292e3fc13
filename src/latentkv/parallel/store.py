"""`Store`: what is used of torch.distributed's key-value stores, whose types torch leaves open."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol


class Store(Protocol):
    """Keys and values that all ranks share."""

    def set(self, key: str, value: str, /) -> object:
        """Write a value."""
        ...

    def get(self, key: str, /) -> bytes:
        """The value of a key, as soon as it is there."""
        ...

    def multi_get(self, keys: list[str], /) -> Sequence[bytes]:
        """The values of keys that are there."""
        ...

    def check(self, keys: list[str], /) -> bool:
        """Whether all of these keys are there."""
        ...

    def set_timeout(self, timeout: timedelta, /) -> None:
        """How long to wait for an answer."""
        ...

    def clone(self) -> Store:
        """Another connection to the same keys, for another thread."""
        ...
