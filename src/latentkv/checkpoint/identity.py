"""What weights are, whatever their folder is called: a digest of their bytes, remembered between starts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from latentkv.errors import CheckpointError
from latentkv.files import write_json
from latentkv.json_files import INDEX_BYTES, read_json


def weights_digest(files: Iterable[Path], memo: Path) -> bytes:
    """SHA-256 of the weights of a checkpoint.

    All bytes are read: a fine-tune may differ from its base in a few rows of one tensor, so no sample would do. A file
    whose size, times of change and inode are those of the last time is not read again.

    Args:
        files: that hold them.
        memo: a JSON file of digests; it may be missing, and is written if it can be.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    known = _read_memo(memo)
    digests: dict[str, list[Any]] = {}
    for path in files:
        name, state = str(path.resolve()), _state(path)
        entry = known.get(name)
        if entry is None or entry[:-1] != state:
            with path.open("rb") as file:
                entry = [*state, hashlib.file_digest(file, "sha256").hexdigest()]
        digests[name] = entry
    if any(known.get(name) != entry for name, entry in digests.items()):
        with suppress(OSError, ValueError):  # then they are read again the next time
            write_json(memo, known | digests)
    return hashlib.sha256("".join(entry[-1] for entry in digests.values()).encode()).digest()


def _state(path: Path) -> list[int]:
    """What changes when a file does."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _read_memo(memo: Path) -> dict[str, list[Any]]:
    """The entries that can be made out."""
    try:
        found = read_json(memo, CheckpointError, most_bytes=INDEX_BYTES)
    except CheckpointError:
        return {}
    return {name: entry for name, entry in found.items() if _is_entry(entry)}


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 5 and isinstance(entry[-1], str) and len(entry[-1]) == 64
