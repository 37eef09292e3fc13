"""`StoredFiles`: sizes of files and when each was used, to know which one goes first."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush

_BLOCK = 4096
_SLACK = 1024


@dataclass(frozen=True)
class StoredFile:
    """A file.

    Attributes:
        name: in its folder.
        used: when, in nanoseconds since 1970.
        size: bytes that it takes, in whole blocks.
    """

    name: str
    used: int
    size: int


def in_blocks(size: int) -> int:
    """Bytes that a file of `size` bytes takes on a disk, about: whole blocks of 4 KiB."""
    return -(-size // _BLOCK) * _BLOCK


class StoredFiles:
    """Files by name, the one not used for longest first. It knows what it was told, not the disk.

    Attributes:
        total_bytes: of all.
    """

    def __init__(self) -> None:
        self.total_bytes = 0
        self._files: dict[str, StoredFile] = {}
        self._by_use: list[tuple[int, str]] = []  # a heap; entries of earlier uses stay until they come up

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str) -> StoredFile | None:
        """What is known of a file."""
        return self._files.get(name)

    def put(self, file: StoredFile) -> None:
        """Know a file, in place of what was known of it: there is no moment in which it is not known."""
        before = self._files.get(file.name)
        self._files[file.name] = file
        self.total_bytes += file.size - (before.size if before else 0)
        heappush(self._by_use, (file.used, file.name))
        if len(self._by_use) > 2 * len(self._files) + _SLACK:
            self._by_use = [(each.used, each.name) for each in self._files.values()]
            heapify(self._by_use)

    def remove(self, name: str) -> None:
        """Forget a file; one that is not known already is."""
        file = self._files.pop(name, None)
        if file:
            self.total_bytes -= file.size

    def oldest(self) -> StoredFile | None:
        """The file that was not used for longest."""
        while self._by_use:
            used, name = self._by_use[0]
            file = self._files.get(name)
            if file and file.used == used:
                return file
            heappop(self._by_use)
        return None

    def starting_with(self, prefix: str) -> list[StoredFile]:
        """Those whose names begin so."""
        return [file for name, file in self._files.items() if name.startswith(prefix)]
