"""Which release of this package serves."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """As it was installed; "unknown" from a source tree that was not."""
    try:
        return version("latentkv")
    except PackageNotFoundError:
        return "unknown"
