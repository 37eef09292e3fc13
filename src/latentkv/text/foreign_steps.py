"""What a `tokenizer.json` does to texts that may take without end: patterns that nobody knows, texts that grow.

Only what is known is done in this process. The search goes by keys alone, whatever objects they are in, so that it
misses nothing that the library reads in a way of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from latentkv.errors import TokenizerError
from latentkv.text.known_patterns import is_known, is_slow

MAX_STEPS = 64
"""Objects that describe the steps; published files have up to 20."""

MAX_LITERAL = 64
"""Characters of a text that is searched for."""

MAX_GROWTH = 64
"""Times as long as all steps together can make a text."""


@dataclass(frozen=True)
class ForeignSteps:
    """The steps of a `tokenizer.json` that are not for this process to do.

    Attributes:
        normalizer: as the file has it.
        pre_tokenizer: as the file has it.
        cause: what is foreign in them, in words.
        always: for every text; otherwise only for long ones, as a known pattern is slow.
    """

    normalizer: Any
    pre_tokenizer: Any
    cause: str
    always: bool


def find_foreign_steps(content: dict[str, Any]) -> ForeignSteps | None:
    """What a `tokenizer.json` brings that must not be done here; None if it is as harmless as most."""
    steps = [content.get("normalizer"), content.get("pre_tokenizer")]
    foreign, slow = _search(steps)
    cause = foreign or slow
    return None if cause is None else ForeignSteps(*steps, cause=cause, always=foreign is not None)


def require_known_decoder(content: dict[str, Any], name: str) -> None:
    """Refuses a decoder with a pattern that is not known: it would run wherever tokens become text.

    Raises:
        TokenizerError: it has one.
    """
    cause = next(filter(None, _search(content.get("decoder"))), None)
    if cause is not None:
        raise TokenizerError(
            f"{name}: the decoder has {cause}, which might take any time for an answer: write its steps without it."
        )


def _search(steps: Any) -> tuple[str | None, str | None]:
    """(what is foreign, what is slow), in words."""
    slow: str | None = None
    growth = 1
    for number, step in enumerate(_objects(steps), 1):
        pattern, literal, content = step.get("Regex"), step.get("String"), step.get("content")
        if number > MAX_STEPS:
            return f"more than {MAX_STEPS} steps", None
        if isinstance(pattern, str) and is_slow(pattern):
            slow = f"the pattern {pattern!r}"
        elif pattern is not None and not (isinstance(pattern, str) and is_known(pattern)):
            return f"the pattern {pattern!r:.80}", None
        if literal is not None and len(str(literal)) > MAX_LITERAL:
            return f"the pattern {literal!r:.80}", None
        replaced = step.get("pattern")
        if replaced is not None and isinstance(content, str):
            found = cast("dict[str, Any]", replaced).get("String") if isinstance(replaced, dict) else None
            growth *= max(-(-len(content) // max(len(str(found or " ")), 1)), 1)
        growth *= 1 + len(str(step.get("prepend", "")))
        if growth > MAX_GROWTH:
            return f"replacements that make a text more than {MAX_GROWTH} times as long", None
    return None, slow


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in a JSON value, itself among them."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            entry = cast("dict[str, Any]", value)
            yield entry
            left += entry.values()
        elif isinstance(value, list):
            left += cast("list[Any]", value)
