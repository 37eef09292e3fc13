"""How much a model reasons and says, as variables of its chat template."""

from __future__ import annotations

import re
from typing import Any, Literal

from latentkv.server.errors import ApiError

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Verbosity = Literal["low", "medium", "high"]

_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates turn reasoning on and off."""
_OPENING, _CLOSING = re.compile(r"\{[%{]"), re.compile(r"[%}]\}")


def template_variables(
    effort: Effort | None, verbosity: Verbosity | None, template: str, *, reasons: bool, notes: list[str]
) -> dict[str, Any]:
    """What a template is told.

    Args:
        effort: goes to a template that knows `reasoning_effort`; one that can only turn reasoning on or off is told
            that, and a model that does not reason has none to grade.
        verbosity: likewise, a wish; "medium" is what happens where nothing is said.
        template: source of the chat template.
        reasons: whether the model is known to reason.
        notes: what has no effect is added to it.

    Raises:
        ApiError: reasoning cannot be turned off.
    """
    variables: dict[str, Any] = {}
    switch = next((name for name in _SWITCHES if _knows(template, name)), None)
    if effort is not None and _knows(template, "reasoning_effort"):
        variables["reasoning_effort"] = effort
    elif effort is not None and switch:
        variables[switch] = effort != "none"
    elif effort == "none" and reasons:
        raise ApiError(
            400,
            'reasoning_effort="none" is not possible here: this model\'s chat template cannot turn its reasoning off; '
            "leave it out.",
            param="reasoning_effort",
        )
    if verbosity is not None and _knows(template, "verbosity"):
        variables["verbosity"] = verbosity
    elif verbosity in ("low", "high"):
        notes.append("verbosity is not known to the chat template")
    return variables


def can_be_switched(template: str) -> bool:
    """Whether a template can be told to leave reasoning out."""
    return any(_knows(template, name) for name in ("reasoning_effort", *_SWITCHES))


def _knows(template: str, variable: str) -> bool:
    """Whether a template reads a variable of this name; a key of a message, or text, is none."""
    name = re.compile(rf"(?<![\w.'\"]){variable}(?![\w'\"])")
    return any(name.search(_CLOSING.split(block, maxsplit=1)[0]) for block in _OPENING.split(template)[1:])
