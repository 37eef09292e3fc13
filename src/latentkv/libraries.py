"""What libraries raise about a file that is not theirs to judge: bare exceptions, and panics of Rust."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from latentkv.errors import LatentKVError

_PANIC = "PanicException"
"""Of pyo3, which has no module to import it from; it is no `Exception`, so that it would pass every handler."""


@contextmanager
def errors_as(error: type[LatentKVError], what: str, remedy: str = "fetch the file again") -> Generator[None]:
    """Has whatever a library raises inside, panics too, become one sentence.

    Args:
        error: the type that is raised.
        what: what could not be done, and with which file; the library's own words follow in parentheses.
        remedy: what to do.

    Raises:
        LatentKVError: of type `error`.
    """
    try:
        yield
    except LatentKVError:
        raise
    except BaseException as reason:
        if not isinstance(reason, Exception) and type(reason).__name__ != _PANIC:
            raise
        raise error(f"{what} ({' '.join(str(reason).split())[:200]}): {remedy}.") from reason
