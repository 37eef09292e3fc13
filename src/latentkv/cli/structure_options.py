"""Options that ask for a text of a given form."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from latentkv.errors import RequestError
from latentkv.option_types import Flag
from latentkv.structure import Structure

_File = Annotated[Path, Flag(metavar="FILE")]


@dataclass(frozen=True)
class StructureOptions:
    """The form that a text must have; at most one of them.

    Attributes:
        json_schema: file with a JSON schema that the text, which is JSON, must obey.
        regex: regular expression that matches the whole text.
        choice: one of the texts that may come out; repeatable.
        grammar: file with a Lark grammar that the text follows.
    """

    _: KW_ONLY
    json_schema: _File | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()
    grammar: _File | None = None

    def read(self) -> Structure | None:
        """The structure that is asked for, None where none is.

        Raises:
            RequestError: several are, or a file cannot be read.
        """
        given = [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value not in (None, ())]
        if len(given) > 1:
            raise RequestError(f"{' and '.join(given)} cannot be had together: give one of them.")
        if self.json_schema is not None:
            return Structure.json_schema(_read(self.json_schema))
        if self.regex is not None:
            return Structure.regex(self.regex)
        if self.choice:
            return Structure.choice(self.choice)
        return None if self.grammar is None else Structure.grammar(_read(self.grammar))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RequestError(f"Cannot read {path} as text: {error}.") from error
