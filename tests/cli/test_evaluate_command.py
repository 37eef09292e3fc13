"""`latentkv evaluate`: what is printed and kept, what it compares, how it ends, and wrong usage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from latentkv import LLM
from latentkv.evaluate import PAGE_FILE, REPORT_FILE

Command = Callable[..., Result]


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(
        "\n\n".join(
            f"The whale swam on, and harpooner {i} watched it from the mast. Where is the whale? asked the captain "
            f"of the other ship, and {i} men went to look for it from every mast that there was on the ship"
            for i in range(40)
        )
    )
    return path


@pytest.fixture
def small(model_folder: Path, book: Path) -> tuple[object, ...]:
    """The command, with as little to do as there can be."""
    sizes = ("--text-bytes", 600, "--samples", 2, "--shots", 0, "--lengths", "200,4k", "--depths", "0,100")
    return ("evaluate", model_folder, "--text", book, *sizes, "--threads", 1, "--kv-cache-bytes", "1MiB")


def test_figures_are_printed_and_kept_in_a_folder(latentkv: Command, small: tuple[object, ...], tmp_path: Path):
    result = latentkv(*small, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    for line in ("perplexity", "bits a byte", "copy", "lookup", "arithmetic", "cloze", "100 %", "asked as plain text"):
        assert line in result.stdout
    assert "note: lookup at 4k is left out: " in result.stdout
    assert "source" not in result.stdout
    kept = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert kept["command"].startswith("latentkv") and kept["environment"]["threads"] == 1
    assert {task["name"]: task["model"]["total"] for task in kept["tasks"]} == {
        "copy": 2,
        "lookup": 2,
        "arithmetic": 2,
        "cloze": 2,
    }
    assert (tmp_path / "out" / PAGE_FILE).read_text().startswith("<!doctype html>")


def test_json_has_the_figures_of_the_folder(latentkv: Command, small: tuple[object, ...], tmp_path: Path):
    printed = json.loads(latentkv(*small, "--json").stdout)
    assert latentkv(*small, "--out", tmp_path / "out").exit_code == 0
    kept = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    for name in ("text", "tasks", "notes", "chat", "window", "options"):
        assert printed[name] == kept[name]


def test_against_loads_the_source_as_its_files_are(
    latentkv: Command, small: tuple[object, ...], model_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    loaded: list[tuple[str, str | None]] = []
    init = LLM.__init__

    def noted(self: LLM, *given: object, **named: object) -> None:
        loaded.append((str(named["kv_dtype"]), named["weights"]))  # type: ignore[arg-type]
        init(self, *given, **named)

    monkeypatch.setattr(LLM, "__init__", noted)
    options = ("--kv-dtype", "int8", "--weights", "int8", "--dtype", "bf16", "--tasks", "none")
    result = latentkv(*small, *options, "--against", model_folder, "--json")
    assert result.exit_code == 0, result.stderr
    assert loaded == [("int8", "int8"), ("auto", None)]
    pair = json.loads(result.stdout)["text"]["pair"]
    assert pair["divergence"]["mean"] > 0 and pair["agreement"]["mean"] < 1

    same = latentkv(*small, "--against", model_folder, "--tasks", "none", "--json")
    pair = json.loads(same.stdout)["text"]["pair"]
    assert (pair["divergence"]["mean"], pair["agreement"]["mean"]) == (0, 1)


def test_differences_are_printed_beside_both_models(latentkv: Command, small: tuple[object, ...], model_folder: Path):
    result = latentkv(*small, "--against", model_folder, "--tasks", "copy,lookup")
    assert result.exit_code == 0, result.stderr
    for line in ("KL(source || model), nats a token", "likeliest token the source's", "100.0 %", "only the model 0"):
        assert line in result.stdout
    assert "lookup by depth in the prompt and its length in tokens, model / source" in result.stdout


def test_ctrl_c_keeps_what_was_found_and_the_same_command_goes_on(
    latentkv: Command, small: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, generate, calls = tmp_path / "out", LLM.generate, 0

    def interrupted(self: LLM, *given: object, **named: object):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return generate(self, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(LLM, "generate", interrupted)
    result = latentkv(*small, "--out", out)
    assert result.exit_code == 130
    assert f"What was found is kept in {out}: the same command goes on." in result.stderr
    assert len(json.loads((out / REPORT_FILE).read_text())["found"]["cells"]) == 2
    assert latentkv(*small, "--out", out).exit_code == 0
    assert calls == 3 + 3  # copy, arithmetic, cloze (twice: it was interrupted) and both depths of lookup


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tasks", "chess"), "--tasks: 'chess' is no task: choose of copy, arithmetic, cloze, lookup, or say all"),
        (("--shots", "99"), "--shots must be a whole number from 0 to 16, not 99."),
        (("--depths", "0,200"), "--depths must be a whole number from 0 to 100, not 200."),
        (("--against", "org/none", "--pipeline-parallel", "2"), "--against takes both models in one process"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(
    latentkv: Command, small: tuple[object, ...], options: tuple[str, ...], message: str
):
    result = latentkv(*small, *options)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1


def test_a_text_must_be_named_and_hold_something(latentkv: Command, model_folder: Path, tmp_path: Path):
    (tmp_path / "empty.txt").write_text(" \n")
    assert "--text" in latentkv("evaluate", model_folder).stderr
    result = latentkv("evaluate", model_folder, "--text", tmp_path / "empty.txt")
    assert (result.exit_code, result.stderr) == (
        2,
        f"error: {tmp_path / 'empty.txt'} holds no text: name a file of UTF-8 text.\n",
    )
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    result = latentkv("evaluate", model_folder, "--text", tmp_path / "bytes.txt")
    assert result.exit_code == 2 and "as UTF-8 text" in result.stderr
