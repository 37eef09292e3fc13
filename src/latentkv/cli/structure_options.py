"""Options that ask for a text of a given form."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentkv.errors import RequestError

if TYPE_CHECKING:
    from latentkv import Structure

SchemaOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The text is JSON that the JSON schema in this file validates.")
]
RegexOption = Annotated[str | None, typer.Option(help="This regular expression matches the whole text.")]
ChoiceOption = Annotated[list[str] | None, typer.Option(help="The text is one of these; repeatable.")]
GrammarOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The text follows the Lark grammar in this file.")
]


def read_structure(
    json_schema: Path | None, regex: str | None, choice: list[str] | None, grammar: Path | None
) -> Structure | None:
    """The structure that the options ask for, None where they ask for none."""
    from latentkv import Structure

    given = [
        name
        for name, value in {
            "--json-schema": json_schema,
            "--regex": regex,
            "--choice": choice or None,
            "--grammar": grammar,
        }.items()
        if value is not None
    ]
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)} cannot be had together: give one of them.")
    if json_schema is not None:
        return Structure.json_schema(_read(json_schema))
    if regex is not None:
        return Structure.regex(regex)
    if choice:
        return Structure.choice(choice)
    return None if grammar is None else Structure.grammar(_read(grammar))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RequestError(f"Cannot read {path} as text: {error}.") from error
