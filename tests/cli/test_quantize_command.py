"""`latentkv quantize`: the report, the perplexity, and wrong usage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latentkv import LLM
from latentkv.llm_options import embedded_model

LICENSE = Path(__file__).parents[2] / "LICENSE"
TEXT = "The whale swam on, and the harpooner watched it from the mast.\n" * 4


def test_a_model_is_quantised_and_the_report_printed(latentkv, model_folder, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    asked = ("quantize", model_folder, tmp_path / "out", "--weights", "int4", "--text", tmp_path / "text.txt")
    result = latentkv(*asked)
    assert result.exit_code == 0, result.stderr
    for words in ("relative error", "routed experts", "int4, groups of 32", "lm head", "int8, rows", "perplexity"):
        assert words in result.stdout
    saved = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    measured = saved["perplexity"]
    assert measured["before"]["perplexity"] == LLM(model_folder).perplexity(TEXT).perplexity
    assert measured["after"]["perplexity"] == LLM(tmp_path / "out").perplexity(TEXT).perplexity
    assert measured["before"] != measured["after"]
    agreement = LLM(tmp_path / "out").predict(TEXT).agreement(LLM(model_folder).predict(TEXT))
    assert 0 < measured["after"]["same_likeliest"] == agreement < 1
    again = latentkv(*asked, "--json")
    assert again.exit_code == 0, again.stderr
    printed = json.loads(again.stdout)
    assert printed["total"] == saved["total"] and printed["perplexity"] == measured


def test_what_int8_activations_would_cost_is_said_of_a_copy_that_runs_on_its_codes(latentkv, tmp_path):
    text = LICENSE.read_text()[:6000]  # so much that what rounding adds to a few tokens does not decide
    (tmp_path / "text.txt").write_text(text)
    asked = ("--weights", "int4", "--text", tmp_path / "text.txt")
    result = latentkv("quantize", embedded_model(), tmp_path / "out", *asked)
    assert result.exit_code == 0, result.stderr
    assert "with --activations int8" in result.stdout
    measured = json.loads((tmp_path / "out" / "quantization_report.json").read_text())["perplexity"]
    exact, rounded = measured["after"], measured["after, int8 activations"]
    assert exact != rounded
    predicted = LLM(tmp_path / "out", activations="int8").predict(text)
    assert rounded["perplexity"] == predicted.perplexity.perplexity
    assert rounded["perplexity"] == pytest.approx(exact["perplexity"], rel=0.01)
    assert rounded["same_likeliest_as_after"] == predicted.agreement(LLM(tmp_path / "out").predict(text)) > 0.9
    assert rounded["same_likeliest"] == predicted.agreement(LLM(embedded_model()).predict(text)) > 0.8


def test_a_copy_that_rounds_nothing_prints_no_table_of_errors(latentkv, model_folder, tmp_path):
    result = latentkv("quantize", model_folder, tmp_path / "out.gguf", "--type", "f32", "--pre", "none")
    assert result.exit_code == 0, result.stderr
    assert "||W" not in result.stdout and "F32" in result.stdout


def test_no_more_of_the_text_is_read_than_asked(latentkv, model_folder, tmp_path):
    (tmp_path / "text.txt").write_text("é" * 100)
    asked = ("--weights", "int8", "--text", tmp_path / "text.txt", "--text-bytes", 11, "--json")
    result = latentkv("quantize", model_folder, tmp_path / "out", *asked)
    assert json.loads(result.stdout)["perplexity"]["before"]["bytes"] == 10


def test_inspect_shows_the_copy(latentkv, model_folder, tmp_path):
    assert latentkv("quantize", model_folder, tmp_path / "out", "--weights", "int4").exit_code == 0
    facts = json.loads(latentkv("inspect", tmp_path / "out", "--json").stdout)
    assert facts["parameters_stored"] == facts["parameters"]
    assert {"int4", "int8", "float32"} <= set(facts["by_dtype"])
    assert facts["by_dtype"]["int4"]["bytes"] < 0.8 * facts["by_dtype"]["int4"]["parameters"]


def test_the_copy_generates(latentkv, model_folder, tmp_path):
    assert latentkv("quantize", model_folder, tmp_path / "out", "--weights", "int8").exit_code == 0
    result = latentkv("generate", "-m", tmp_path / "out", "The whale", "--max-tokens", 4, "--seed", 0)
    assert result.exit_code == 0, result.stderr


WRONG = [
    ((), "Missing option '--weights'"),
    (("--weights", "int3"), "unknown weight format 'int3'"),
    (("--weights", "int4", "--group", 48), "groups of 48"),
    (("--weights", "int4", "--threads", 0), "--threads must be a whole number from 1 to 1,024"),
    (("--weights", "int4", "--text", "nothing.txt"), "does not exist"),
    (("--weights", "int4", "--text", "{empty}"), "no text to score"),
    (("--weights", "int4", "--text", "{text}", "--text-bytes", 0), "--text-bytes must be 1 or more"),
]


@pytest.mark.parametrize(("options", "words"), WRONG, ids=[words for _, words in WRONG])
def test_wrong_usage_is_said_and_nothing_is_made(latentkv, model_folder, tmp_path, options, words):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "empty.txt").write_text("")
    files = {"{text}": tmp_path / "text.txt", "{empty}": tmp_path / "empty.txt"}
    result = latentkv("quantize", model_folder, tmp_path / "out", *(files.get(option, option) for option in options))
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_target_that_holds_something_else_is_refused_before_the_model_is_looked_for(latentkv, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    for name, words in (("out", "out exists and is not empty: name a new folder"), ("file", "is a file, not a folder")):
        refused = latentkv("quantize", tmp_path / "nothing", tmp_path / name, "--weights", "int8")
        assert refused.exit_code == 2 and words in refused.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


GGUF = ("--type", "q8_0", "--pre", "qwen2")


def test_a_gguf_file_is_written_measured_and_reported(latentkv, model_folder, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    asked = ("quantize", model_folder, tmp_path / "new" / "out.gguf", *GGUF, "--text", tmp_path / "text.txt")
    result = latentkv(*asked)
    assert result.exit_code == 0, result.stderr
    for words in (
        "relative error",
        "Q8_0",
        "routed experts",
        "perplexity",
        "note: texts are cut as by qwen2",
        "--json",
    ):
        assert words in result.stdout
    (tmp_path / "new" / "out.gguf").unlink()
    printed = json.loads(latentkv(*asked, "--json").stdout)
    assert printed["total"]["bytes_after"] < 0.5 * printed["total"]["bytes_before"] and len(printed["notes"]) == 1
    measured = printed["perplexity"]
    assert measured["before"]["perplexity"] == LLM(model_folder).perplexity(TEXT).perplexity
    assert measured["after"]["perplexity"] == LLM(tmp_path / "new" / "out.gguf").perplexity(TEXT).perplexity
    generated = latentkv("generate", "-m", tmp_path / "new" / "out.gguf", "The whale", "--max-tokens", 4)
    assert generated.exit_code == 0, generated.stderr


@pytest.mark.parametrize(
    ("name", "options"), [("out", ("--weights", "int4")), ("out.gguf", ("--type", "q4_0", "--pre", "qwen2"))]
)
def test_a_calibration_text_changes_the_copy(latentkv, model_folder, tmp_path, name, options):
    (tmp_path / "text.txt").write_text(TEXT)
    for folder, further in (("plain", ()), ("weighed", ("--calibrate", tmp_path / "text.txt"))):
        result = latentkv("quantize", model_folder, tmp_path / folder / name, *options, *further)
        assert result.exit_code == 0, result.stderr
    plain, weighed = (LLM(tmp_path / folder / name).logits(list(range(3, 40))) for folder in ("plain", "weighed"))
    assert not plain.equal(weighed)


WRONG_GGUF = [
    ("out.gguf", (), "Missing option '--type': say what"),
    ("out.gguf", ("--type", "q5_k"), "unknown type 'q5_k' for GGUF; choose one of f32, f16, bf16, q8_0"),
    ("out.gguf", (*GGUF, "--weights", "int4"), "--weights is for a folder: for the GGUF file"),
    ("out.gguf", (*GGUF, "--group", 32), "--group is for a folder"),
    ("out.gguf", ("--type", "q8_0", "--pre", "none", "--text", "{text}"), "--text needs the tokenizer that --pre none"),
    ("out.gguf", ("--type", "q8_0"), "cuts texts before it merges them in a way that GGUF (llama.cpp) has no name for"),
    ("out.gguf", ("--type", "q8_0", "--pre", "gpt-9"), "'gpt-9', which is not known here"),
    ("out.gguf", (*GGUF, "--calibrate", "{empty}"), "no text to calibrate on"),
    ("out.gguf", (*GGUF, "--calibrate", "{text}", "--calibrate-bytes", 0), "--calibrate-bytes must be 1 or more"),
    ("text.txt/out.gguf", GGUF, "is a file, not a folder"),
    ("out", ("--type", "q8_0"), "--type is for a target that ends in .gguf: for the folder"),
    ("out", ("--weights", "int8", "--pre", "qwen2"), "--pre is for a target that ends in .gguf"),
]


@pytest.mark.parametrize(("name", "options", "words"), WRONG_GGUF, ids=[words for *_, words in WRONG_GGUF])
def test_what_does_not_fit_the_target_is_said_and_nothing_is_made(
    latentkv, model_folder, tmp_path, name, options, words
):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "empty.txt").write_text("")
    files = {"{text}": tmp_path / "text.txt", "{empty}": tmp_path / "empty.txt"}
    result = latentkv("quantize", model_folder, tmp_path / name, *(files.get(option, option) for option in options))
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "text.txt"]


def test_a_gguf_file_is_not_replaced(latentkv, model_folder, tmp_path):
    (tmp_path / "out.gguf").write_text("mine")
    refused = latentkv("quantize", model_folder, tmp_path / "out.gguf", *GGUF)
    assert refused.exit_code == 2 and "exists: name a new file" in refused.stderr
    assert (tmp_path / "out.gguf").read_text() == "mine"


def test_a_gguf_file_of_plain_types_is_a_source_and_a_quantised_one_is_none(latentkv, model_folder, tmp_path):
    whole, small, again = (tmp_path / name for name in ("whole.gguf", "small.gguf", "again.gguf"))
    assert latentkv("quantize", model_folder, whole, "--type", "f32", "--pre", "qwen2").exit_code == 0
    result = latentkv("quantize", whole, small, "--type", "q8_0")
    assert result.exit_code == 0, result.stderr
    refused = latentkv("quantize", small, again, "--type", "q4_0")
    assert refused.exit_code == 2 and "is quantised already" in refused.stderr and not again.exists()


def test_bad_sources_are_refused(latentkv, copied_model, tmp_path):
    missing = latentkv("quantize", tmp_path / "nothing here", tmp_path / "out", "--weights", "int4")
    assert missing.exit_code == 2 and "nothing here" in missing.stderr
    (copied_model / "tokenizer.json").unlink()
    (copied_model / "tokenizer_config.json").unlink()
    (tmp_path / "text.txt").write_text(TEXT)
    silent = latentkv("quantize", copied_model, tmp_path / "out", "--weights", "int4", "--text", tmp_path / "text.txt")
    assert silent.exit_code == 2 and "needs a tokenizer" in silent.stderr
    assert not (tmp_path / "out").exists()
