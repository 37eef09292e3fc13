"""What a field of options tells the command line beside its name, type, default and docstring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from latentkv.errors import RequestError
from latentkv.sizes import format_tokens, parse_bytes, parse_tokens


@dataclass(frozen=True)
class Flag:
    """How an option is written, where its field alone does not tell; several of one field complete each other.

    Attributes:
        names: all of them, such as ("--model", "-m"); empty: the field's name, with - for _.
        without: a second option, such as "--no-packed-dir", that stands for None.
        metavar: what the help calls the value.
        envvar: an environment variable that may hold it.
        read: makes the value of a text, and raises a `LatentKVError` where it is none.
        show: makes a text of a default, which `read` would take.
        exists: the path must be there.
        file: the path must be no folder.
        callback: is called with typer's context and the value before all other options are read.
        offered: whether the command line has it at all.
    """

    names: Sequence[str] = ()
    without: str | None = None
    metavar: str | None = None
    envvar: str | None = None
    read: Callable[[str], Any] | None = None
    show: Callable[[Any], str] = str
    exists: bool = False
    file: bool = False
    callback: Callable[..., Any] | None = None
    offered: bool = True


def parse_numbers(text: str) -> tuple[int, ...]:
    """Read numbers of tokens (or of anything) with commas between; 4k is 4096, and 0 is allowed.

    Raises:
        RequestError: one of them is no number.
    """
    return tuple(0 if part.strip() == "0" else parse_tokens(part) for part in text.split(","))


def parse_floats(text: str) -> tuple[float, ...]:
    """Read numbers with commas between.

    Raises:
        RequestError: one of them is no number.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"{text!r} is no list of numbers; write for example 0.5,2.") from None


def parse_words(text: str) -> tuple[str, ...]:
    """Read words with commas between."""
    return tuple(part.strip() for part in text.split(","))


def _format_floats(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _format_numbers(values: Sequence[int]) -> str:
    return ",".join(map(format_tokens, values))


def _format_size(size: int) -> str:
    for power, unit in enumerate(("TiB", "GiB", "MiB", "KiB")):
        if size % (one := 1024 ** (4 - power)) == 0:
            return f"{size // one}{unit}"
    return str(size)


Bytes = Annotated[int, Flag(read=parse_bytes, show=_format_size, metavar="SIZE")]
"""A number of bytes, like 2GiB."""
Tokens = Annotated[int, Flag(read=parse_tokens, show=format_tokens, metavar="TOKENS")]
"""A number of tokens, like 4096 or 32k."""
Numbers = Annotated[tuple[int, ...], Flag(read=parse_numbers, show=_format_numbers, metavar="N,N")]
"""Numbers with commas between, like 1,8,4k."""
Floats = Annotated[tuple[float, ...], Flag(read=parse_floats, show=_format_floats, metavar="X,X")]
"""Numbers with commas between, like 0,0.8."""
Words = Annotated[tuple[str, ...], Flag(read=parse_words, show=",".join, metavar="WORD,WORD")]
"""Words with commas between, like bf16,int8."""
KVDtype = Annotated[str, Flag(("--kv-dtype", "--kv-cache-dtype"))]
"""How a cache stores tokens."""
TextFile = Annotated[Path, Flag(exists=True, file=True)]
"""A file that is there."""
