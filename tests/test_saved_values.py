"""What an interrupted run left behind is gone on with only if it is what was written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from latentkv.errors import TrainingError
from latentkv.saved_values import as_saved, saved_in


@dataclass(frozen=True)
class Inner:
    """A value inside another."""

    number: float | None


@dataclass(frozen=True)
class Saved:
    """One field of each kind."""

    step: int
    seconds: float
    done: bool
    kind: Literal["a", "b"]
    options: dict[str, Any]
    pairs: tuple[tuple[int, float], ...]
    inner: list[Inner]


GOOD: dict[str, Any] = {
    "step": 3,
    "seconds": 2,
    "done": False,
    "kind": "a",
    "options": {"lr": [1]},
    "pairs": [[1, 2.5]],
    "inner": [{"number": None}, {"number": 1.5}],
}


def test_what_json_made_of_a_value_becomes_that_value() -> None:
    found = as_saved(Saved, GOOD)
    assert found == Saved(3, 2, False, "a", {"lr": [1]}, ((1, 2.5),), [Inner(None), Inner(1.5)])
    assert as_saved(Saved, asdict(found)) == found


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("step", True),
        ("step", 1.5),
        ("step", None),
        ("seconds", "2"),
        ("done", 0),
        ("kind", 1),
        ("options", []),
        ("pairs", {}),
        ("pairs", [[1]]),
        ("pairs", [[1, "2"]]),
        ("inner", [{}]),
        ("inner", [{"number": 1, "more": 1}]),
        ("inner", [[]]),
    ],
)
def test_a_field_of_another_type_is_refused(name: str, wrong: object) -> None:
    with pytest.raises(ValueError, match=r"is no|is missing|is not known|values, not"):
        as_saved(Saved, GOOD | {name: wrong})


def test_missing_and_unknown_fields_are_named() -> None:
    for values, words in (
        ({key: GOOD[key] for key in GOOD if key != "step"}, "step is missing"),
        (GOOD | {"more": 1}, "more is not known"),
        ([], "Saved is no object"),
    ):
        with pytest.raises(ValueError, match=words):
            as_saved(Saved, values)


def test_whatever_goes_wrong_is_one_sentence_that_names_file_and_remedy() -> None:
    def deep() -> None:
        deep()

    def lookup() -> object:
        return {}["step"]

    for fail, words in ((deep, "maximum recursion"), (lookup, "it lacks 'step'"), (lambda: int("x"), "invalid")):
        with (
            pytest.raises(TrainingError, match=rf"^state.json is damaged \(.*{words}.*\): remove it\.$"),
            saved_in(Path("state.json"), TrainingError, "remove it"),
        ):
            fail()
