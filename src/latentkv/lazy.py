"""Names that a package imports when they are first used: --help, which reads options, does not wait for torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any


def lazily(package: str, **names: Sequence[str]) -> Callable[[str], Any]:
    """What a package takes for its `__getattr__`.

    Args:
        package: its `__name__`.
        names: what is in each of its modules.
    """
    homes = {name: f"{package}.{module}" for module, several in names.items() for name in several}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return get
