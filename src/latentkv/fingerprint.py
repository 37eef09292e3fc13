"""`fingerprint`: tells a piece of long work from every other, so that only the same work goes on with its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path


def fingerprint(parts: Iterable[object]) -> str:
    """A SHA-256, in hexadecimal, of all that decides what comes out.

    Files that wait for their work to go on hold these: for the same parts it must never change.

    Args:
        parts: bytes, which count as they are; and whatever JSON can hold, the order of whose keys does not count.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()


def file_states(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """(name, bytes, time of change in ns) of files that are too large to be read for a fingerprint."""
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
