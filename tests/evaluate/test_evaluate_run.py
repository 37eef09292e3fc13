"""Whole evaluations: what a model knows counts as right, what was found stays found, what cannot be asked is said."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from latentkv import LLM, SamplingParams
from latentkv.errors import RequestError
from latentkv.evaluate import (
    PAGE_FILE,
    REPORT_FILE,
    Evaluated,
    EvaluateOptions,
    EvaluationFolder,
    Report,
    Text,
    evaluate_model,
)

SMALL = EvaluateOptions(
    text_bytes=1500, window=64, samples=4, shots=1, lengths=(256, 512, 8192), depths=(0, 50, 100), chat=False
)
ENVIRONMENT = {"latentkv": "0.1.0", "cpu": "a <fast> CPU", "threads": 1, "python": "3.11", "torch": "2.13"}
FACTS = {"command": "latentkv evaluate 'a<b'", "environment": ENVIRONMENT}


def evaluate(model: LLM, source: LLM | None, text: Text, options: EvaluateOptions, out: Path | None = None) -> Report:
    folder = None if out is None else EvaluationFolder(out)
    beside = None if source is None else Evaluated(source, "the <source>", {})
    return evaluate_model(Evaluated(model, "a & b", {}), beside, text, options, facts=FACTS, folder=folder)


def test_of_text_that_a_model_wrote_itself_it_knows_every_last_word():
    llm = LLM(kv_cache_bytes=16 << 20, dtype="fp32")
    beginnings = (
        "It was a dark night, and",
        "The old house stood",
        "In the morning they went",
        "She looked at him and",
    )
    written = [done.text for done in llm.generate(beginnings, SamplingParams(max_tokens=60, temperature=0))]
    wholes = [f"{a}{b}".rpartition(" ")[0].rstrip(",.") for a, b in zip(beginnings, written, strict=True)]
    own = Text(("own.txt",), ("\n\n".join(wholes),))
    options = EvaluateOptions(text_bytes=500, samples=4, shots=0, tasks=("cloze",))
    (cloze,) = evaluate(llm, llm, own, options).tasks
    assert (cloze.model.right, cloze.model.total) == (4, 4)
    assert cloze.source is not None and cloze.pair is not None
    assert (cloze.source.right, cloze.pair.difference.mean) == (4, 0)

    changed = Text(("changed.txt",), ("\n\n".join(f"{whole.rpartition(' ')[0]} xylophone" for whole in wholes),))
    (cloze,) = evaluate(llm, None, changed, options).tasks
    assert (cloze.model.right, cloze.source) == (0, None)


def test_a_model_beside_itself_gives_the_same_answers(source: LLM, text: Text):
    report = evaluate(source, source, text, SMALL)
    assert [task.name for task in report.tasks] == ["copy", "arithmetic", "cloze", "lookup"]
    for task in report.tasks:
        assert task.source == task.model
        assert task.pair is not None and (task.pair.only_model, task.pair.only_source) == (0, 0)


def test_lookup_is_asked_at_every_depth_of_the_lengths_that_the_model_holds(source: LLM, text: Text):
    report = evaluate(source, None, text, replace(SMALL, tasks=("lookup",)))
    (lookup,) = report.tasks
    assert [(cell.length, cell.depth) for cell in lookup.cells] == [(n, d) for n in (256, 512) for d in (0, 50, 100)]
    assert lookup.model.total == 2 * 3 * 2  # 4 samples of a length, shared out among three depths
    assert report.notes == ["lookup at 8k is left out: a & b holds 1,024 tokens"]


def test_prompts_of_one_passage_are_read_once_up_to_where_they_differ(folders: dict[str, Path], text: Text):
    llm = LLM(folders["source"], kv_cache_bytes=1 << 20)
    evaluate(llm, None, text, replace(SMALL, tasks=("lookup",), lengths=(512,), depths=(50, 100), samples=2))
    counters = llm.engine.counters
    assert counters.prompt_tokens > 900  # two prompts
    assert 128 <= counters.prefix_hits <= 256  # full pages of 64, of the half before the hidden sentence


def test_a_length_that_the_text_does_not_fill_is_left_out_and_said(source: LLM):
    short = Text(("short.txt",), ("The ship was seen from the island that day. " * 3,))
    report = evaluate(source, None, short, replace(SMALL, tasks=("lookup",), lengths=(256, 512)))
    assert report.tasks == []
    assert len(report.notes) == 2 and "lookup at 256 is left out: the text has" in report.notes[0]


def test_no_tasks_are_text_alone(source: LLM, text: Text):
    report = evaluate(source, None, text, replace(SMALL, tasks=("none",), window=4096))
    assert report.tasks == [] and report.text is not None
    assert report.window == 1024
    assert report.notes == ["text is read in windows of 1,024 tokens, which is what there is room for"]


class Interrupted(Exception):
    pass


def test_an_evaluation_goes_on_where_it_was_interrupted(
    source: LLM, model: LLM, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = evaluate(model, source, text, SMALL, tmp_path / "whole")
    asked: list[int] = []
    generate = LLM.generate

    def counted(self: LLM, prompts: list[list[int]], *given: object, **named: object):
        if len(asked) == 5:
            raise Interrupted
        asked.append(len(prompts))
        return generate(self, prompts, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(LLM, "generate", counted)
        with pytest.raises(Interrupted):
            evaluate(model, source, text, SMALL, tmp_path / "parts")
        saved = json.loads((tmp_path / "parts" / REPORT_FILE).read_text())
        assert saved["text"] and len(saved["found"]["cells"]) == 2  # each of them asked of both models
        asked.clear()
        assert evaluate(model, source, text, replace(SMALL, tasks=("copy",)), tmp_path / "parts").text == whole.text
        assert asked == []  # copy was done
    assert evaluate(model, source, text, SMALL, tmp_path / "parts") == whole
    again = (tmp_path / "parts" / REPORT_FILE).read_bytes()
    assert again == (tmp_path / "whole" / REPORT_FILE).read_bytes()


@pytest.mark.parametrize(
    ("change", "named"),
    [({"samples": 5}, "samples"), ({"seed": 3}, "seed"), ({"window": 32}, "window"), ({"depths": (0,)}, "depths")],
)
def test_a_folder_of_another_evaluation_is_refused_by_what_is_other(
    change: dict[str, object], named: str, source: LLM, text: Text, tmp_path: Path
):
    options = replace(SMALL, tasks=("arithmetic",))
    evaluate(source, None, text, options, tmp_path / "out")
    before = (tmp_path / "out" / REPORT_FILE).read_bytes()
    with pytest.raises(RequestError, match=rf"out holds an evaluation with another {named}: name another folder"):
        evaluate(source, None, text, replace(options, **change), tmp_path / "out")
    with pytest.raises(RequestError, match="holds an evaluation with another source"):
        evaluate(source, source, text, options, tmp_path / "out")
    assert (tmp_path / "out" / REPORT_FILE).read_bytes() == before


def test_a_folder_of_something_else_and_a_damaged_report_are_refused(source: LLM, text: Text, tmp_path: Path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="holds something else than an evaluation: give a new folder"):
        EvaluationFolder(tmp_path / "other")
    options = replace(SMALL, tasks=("arithmetic",))
    evaluate(source, None, text, options, tmp_path / "out")
    path = tmp_path / "out" / REPORT_FILE
    content = json.loads(path.read_text())
    del content["found"]["text"]["nats"]
    path.write_text(json.dumps(content))
    with pytest.raises(RequestError, match=r"evaluation.json is damaged \(.*nats is missing.*\): remove it"):
        evaluate(source, None, text, options, tmp_path / "out")


def test_a_question_that_does_not_fit_is_refused_before_anything_is_computed(folders: dict[str, Path], text: Text):
    small = LLM(folders["source"], max_context=64, kv_cache_bytes=1 << 20)
    with pytest.raises(RequestError, match=r"cloze needs \d+ tokens for a question with its shots, and a & b holds 64"):
        evaluate(small, None, text, replace(SMALL, tasks=("cloze",)))


def test_a_model_without_a_tokenizer_is_refused(folders: dict[str, Path], text: Text, tmp_path: Path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folders["source"] / name).read_bytes())
    with pytest.raises(RequestError, match=r"needs a tokenizer, and .* has none: add tokenizer.json"):
        evaluate(LLM(tmp_path, kv_cache_bytes=1 << 20), None, text, SMALL)


class _Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)


def test_the_page_needs_nothing_from_outside_and_draws_lookup_of_both_models(
    source: LLM, model: LLM, text: Text, tmp_path: Path
):
    evaluate(model, source, text, SMALL, tmp_path / "out")
    page = (tmp_path / "out" / PAGE_FILE).read_text()
    assert not re.search(r"(src|href)=|https?://|<script", page)
    assert "a &amp; b, evaluated, beside the &lt;source&gt;" in page and "a &lt;fast&gt; CPU" in page
    seen = _Elements(page).seen
    assert seen.count("svg") == 2
    assert seen.count("rect") == 2 * 2 * (2 * 3)  # ground and field, of two models, two lengths and three depths
    assert "lookup at 8k is left out: a &amp; b holds 1,024 tokens." in page
    assert "256 tokens, 50 %: " in page and "KL(source || model), nats a token" in page


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": ("copy", "chess")}, r"--tasks: 'chess' is no task: choose of copy, arithmetic, cloze, lookup"),
        ({"tasks": ("all", "copy")}, r"--tasks: 'all' is no task"),
        ({"depths": (0, 101)}, r"--depths must be a whole number from 0 to 100, not 101"),
        ({"lengths": (16,)}, r"--lengths must be a whole number from 64 to"),
        ({"samples": 0}, r"--samples must be"),
        ({"shots": 17}, r"--shots must be"),
        ({"depths": ()}, r"--depths names none"),
    ],
)
def test_options_that_ask_for_nothing_there_is_are_refused(given: dict[str, object], message: str):
    with pytest.raises(RequestError, match=message):
        EvaluateOptions(**given)  # type: ignore[arg-type]


def test_tasks_are_asked_once_and_in_their_order():
    assert EvaluateOptions(tasks=("cloze", "copy", "cloze")).task_names == ("copy", "cloze")
