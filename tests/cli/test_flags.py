"""Options made of dataclasses and docstrings: what a field says is what the command line takes."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner, Result

from latentkv.cli.flags import Preset, as_words, command
from latentkv.option_types import Bytes, Flag, Floats, Numbers, Tokens, Words
from latentkv.ranges import Range


@dataclass(frozen=True)
class Named:
    """What there is.

    Attributes:
        model: a folder, or a repo id; None is the small one.
    """

    model: Annotated[str | None, Flag(("--model", "-m"))] = None


@dataclass(frozen=True)
class DishOptions(Named):
    """A dish.

    Attributes:
        size: room that it takes, like 2GiB; None is half of the `depth`.
        depth: tokens of depth; "auto" keeps its quotes nowhere.
        folder: where it is kept; None keeps it nowhere; "auto" is ~/kept.
        spices: what is in it; repeatable.
        heat: how hot,
            in two lines.
        kind: soup or stew.
        mixed: numbers with commas between.
        secret: nobody is asked.
    """

    _: KW_ONLY
    size: Bytes | None = None
    depth: Annotated[Tokens, Range(1)] = 4096
    folder: Annotated[str | Path | None, Flag(without="--no-folder")] = "auto"
    spices: tuple[str, ...] = ()
    heat: Annotated[float, Range(0, 10)] = 1.5
    kind: Literal["soup", "stew"] = "soup"
    mixed: Numbers = (1, 2048)
    secret: Annotated[int, Flag(offered=False)] = 7


def run(function: Any, *words: object) -> tuple[Result, list[Any]]:
    """Run a command that notes in `LAST` what it is given."""
    app = typer.Typer()
    app.command()(command(function))
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result, [*LAST]


LAST: list[Any] = []


def cook(dish: DishOptions, /, *, hot: bool = False, lid: bool = True, stirred: bool | None = None) -> None:
    """Cook a dish.

    Example: cook soup

    Args:
        dish: what.
        hot: serve it hot.
        lid: put the lid on.
        stirred: stir it; None is as the cook likes.

    Raises:
        ValueError: never.
    """
    LAST[:] = [dish, hot, lid, stirred]


def copy(source: Annotated[Named, Preset(model=...)], target: Path, /, *, name: str) -> None:
    """Copy a dish."""
    LAST[:] = [source.model, target, name]


def season(dish: Annotated[DishOptions, Preset("size", "spices", heat=3.0)], *, by: Words = ("salt",)) -> None:
    """Season a dish."""
    LAST[:] = [dish, by]


def weigh(*, at: Floats = (0, 0.5)) -> None:
    """Weigh it."""
    LAST[:] = [at]


def test_what_is_not_said_is_the_default_of_the_field():
    _, (dish, hot, lid, stirred) = run(cook)
    assert dish == DishOptions()
    assert (hot, lid, stirred) == (False, True, None)


def test_values_are_made_as_the_field_reads_them():
    words = ("--size", "2KiB", "--depth", "8k", "--spices", "salt", "--spices", "dill", "--heat", "2", "--kind", "stew")
    _, (dish, *_) = run(cook, "a/b", *words, "--mixed", "0,1k,3", "--folder", "here")
    expected = {"size": 2048, "depth": 8192, "spices": ("salt", "dill"), "heat": 2.0, "kind": "stew"}
    assert dish == DishOptions("a/b", **expected, mixed=(0, 1024, 3), folder=Path("here"))


def test_flags_of_booleans():
    assert run(cook, "--hot", "--no-lid", "--no-stirred")[1][1:] == [True, False, False]


def test_a_second_option_stands_for_none_and_excludes_the_first():
    assert run(cook, "--no-folder")[1][0].folder is None
    with pytest.raises(Exception, match="--no-folder excludes --folder"):
        run(cook, "--no-folder", "--folder", "x")


def test_an_argument_that_is_named_is_an_option_too():
    assert run(cook, "soup")[1][0].model == run(cook, "-m", "soup")[1][0].model == "soup"
    refused, _ = run(cook, "soup", "--model", "stew")
    assert refused.exit_code == 2
    assert "MODEL is given twice: as an argument and by --model." in refused.output


def test_an_argument_given_by_its_option_leaves_its_place_to_the_next():
    for words in (("a", "b"), ("b", "--model", "a"), ("-m", "a", "b")):
        assert run(copy, *words, "--name", "c")[1] == ["a", Path("b"), "c"]


@pytest.mark.parametrize(
    ("words", "missed"),
    [((), "'MODEL'"), (("a",), "'TARGET'"), (("--model", "a"), "'TARGET'")],
)
def test_what_is_missing_is_named(words, missed):
    refused, _ = run(copy, *words, "--name", "c")
    assert refused.exit_code == 2
    assert f"Missing argument {missed}" in refused.output


def test_a_preset_leaves_fields_out_and_changes_defaults():
    _, (dish, by) = run(season)
    assert (dish.heat, by) == (3.0, ("salt",))
    assert run(season, "--size", "1")[0].exit_code == 2


def test_numbers_outside_of_their_range_and_texts_that_are_none_are_refused_by_name():
    refused, _ = run(cook, "--heat", "11")
    assert refused.exit_code == 2 and "--heat" in refused.output
    with pytest.raises(Exception, match=r"--size: 'much' is not an amount of memory"):
        run(cook, "--size", "much")
    with pytest.raises(Exception, match=r"--at: 'heavy' is no list of numbers"):
        run(weigh, "--at", "heavy")


def test_the_docstrings_are_the_help():
    shown = " ".join(run(cook, "--help")[0].output.replace("│", " ").split())
    for text in (
        "Cook a dish. Example: cook soup",
        "A folder, or a repo id. [default: (the small one)]",
        "Room that it takes, like 2GiB. [default: (half of the --depth)]",
        "Tokens of depth; auto keeps its quotes nowhere. [default: 4k]",
        "Where it is kept. [default: (~/kept)]",
        "--no-folder <bool> Keeps it nowhere.",
        "How hot, in two lines. [default: 1.5]",
        "Numbers with commas between. [default: 1,2k]",
        "Stir it. [default: (as the cook likes)]",
        "Dish options",
    ):
        assert text in shown, text
    for absent in ("Args:", "Raises:", "never", "secret", "Named"):
        assert absent not in shown


def test_options_written_as_words_are_read_as_they_were():
    other = {"size": 2048, "spices": ("salt", "dill"), "heat": 2.0, "kind": "stew", "folder": None}
    for options in (DishOptions(), DishOptions("a/b", **other), DishOptions(folder=Path("here"))):
        assert run(cook, *as_words(options))[1][0] == options
    assert as_words(DishOptions()) == []


def test_a_field_that_no_text_can_become_is_the_programmers_error():
    def odd(*, how: dict[str, int]) -> None:
        """Odd."""

    with pytest.raises(TypeError, match="give its Flag a way to read one"):
        command(odd)


def test_a_dataclass_in_a_dataclass_gives_its_fields_too():
    @dataclass(frozen=True)
    class MealOptions:
        """A meal."""

        dish: DishOptions = DishOptions()
        guests: int = 2

        def __post_init__(self) -> None:
            if self.dish.heat > self.guests:
                raise ValueError("too hot")

    def serve(*, meal: MealOptions) -> None:
        """Serve."""
        LAST[:] = [meal]

    serve.__annotations__["meal"] = MealOptions
    assert run(serve, "--heat", "9", "--guests", "9")[1] == [MealOptions(DishOptions(heat=9.0), 9)]
