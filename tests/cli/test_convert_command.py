"""`latentkv convert` and `latentkv heal`: what they print, and wrong usage."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from latentkv import LLM
from latentkv.convert import PAGE_FILE, REPORT_FILE
from latentkv.errors import TrainingError
from latentkv.llm_options import EMBEDDED_MODEL
from latentkv.resumable import alone_in

pytestmark = pytest.mark.usefixtures("unpainted")

TEXT = "The whale swam on, and the harpooner watched it from the mast.\n" * 60
SMALL = ("--sequences", 8, "--length", 32, "--threads", 1)
SIZES = ("--rank", 24, "--rope-dim", 8)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with grouped-query attention and the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED_MODEL / name, folder / name)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def test_a_model_is_converted_and_healed_and_generates(latentkv, source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = latentkv("convert", source, out, "--kv-budget", "1/2", "--calibrate", text, "--text", text, *SMALL)
    assert result.exit_code == 0, result.stderr
    for words in ("numbers a token and layer, were 64 (50%)", "perplexity", "likeliest token", REPORT_FILE):
        assert words in " ".join(result.stdout.split())
    before = json.loads((out / REPORT_FILE).read_text())
    assert before["rank"] + before["rope_dim"] == 32
    assert before["quality"]["converted"] > 0
    assert before["speed"]["tokens_per_second"]["converted"] > 0 and before["speed"]["threads"] == 1
    assert before["command"].split()[0] == "latentkv" and before["environment"]["threads"] == 1
    page = (out / PAGE_FILE).read_text()
    healed = latentkv("heal", out, "--teacher", source, "--data", text, "--steps", 8, "--eval-every", 3, *SMALL)
    assert healed.exit_code == 0, healed.stderr
    assert "KL to the source" in healed.stdout and "of the source" in " ".join(healed.stdout.split())
    healing = json.loads((out / REPORT_FILE).read_text())["healings"][0]
    assert len(healing["curve"]) == 8 and healing["text"] == str(text)
    assert [each["step"] for each in healing["evaluations"]] == [0, 3, 6, 8]
    # The text of the conversion, as nothing else was asked for: the stages can be compared.
    assert healing["evaluations"][0]["sample"] == before["quality"]["sample"]
    assert "Healing" not in page and "Healing" in (out / PAGE_FILE).read_text()
    assert (out / "tokenizer.json").is_file()
    assert LLM(out).perplexity(TEXT[:200]).tokens > 0


def test_without_a_text_the_source_writes_its_own(latentkv, source: Path, tmp_path: Path) -> None:
    asked = ("convert", source, tmp_path / "out", "--rank", 12, "--rope-dim", 8, *SMALL, "--json")
    result = latentkv(*asked)
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert (printed["rank"], printed["rope_dim"], printed["calibration_tokens"]) == (12, 8, 8 * 32)
    assert json.loads(latentkv(*asked).stdout) == printed


def test_low_rank_updates_are_trained_and_merged(latentkv, source: Path, text: Path, tmp_path: Path) -> None:
    out, given = tmp_path / "out", ("--calibrate", text, *SMALL)
    assert latentkv("convert", source, out, *SIZES, *given).exit_code == 0
    lora = ("--train", "lora", "--lora-rank", 2, "--lora-alpha", 4, "--lr", 1e-2, "--steps", 4, "--batch-size", 4)
    result = latentkv("heal", out, "--teacher", source, "--data", text, *lora, *SMALL, "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert len(printed["losses"]) == 4 and printed["evaluations"] == []
    healing = json.loads((out / REPORT_FILE).read_text())["healings"][0]
    assert (healing["train"], healing["lora_rank"], healing["lora_alpha"]) == ("lora", 2, 4)
    assert LLM(out).perplexity(TEXT[:200]).tokens > 0


def test_speed_is_measured_where_it_is_asked_for_and_converting_again_keeps_what_healing_noted(
    latentkv, source: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = ("convert", source, out, *SIZES, "--calibrate", text, "--text", text, *SMALL)
    assert latentkv(*asked, "--no-speed").exit_code == 0
    assert "speed" not in json.loads((out / REPORT_FILE).read_text())
    assert latentkv("heal", out, "--teacher", source, "--data", text, "--steps", 1, *SMALL).exit_code == 0
    healed = (out / REPORT_FILE).read_bytes()
    again = latentkv(*asked, "--speed")
    assert again.exit_code == 0 and "has been healed since" in again.stderr
    assert (out / REPORT_FILE).read_bytes() == healed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--train", "half"), "--train=half is not allowed: choose all, attention, lora"),
        (("--train", "lora", "--lora-rank", 0), "--lora-rank must be a whole number from 1 to 65,536, not 0."),
        (("--eval-every", 0), "--eval-every must be a whole number from 1 to 2,147,483,647, not 0."),
        (("--eval-every", 5), "--eval-every needs a text to measure on: give --text"),
    ],
)
def test_wrong_healing_is_one_sentence(latentkv, source: Path, options: tuple, message: str) -> None:
    result = latentkv("heal", source, "--teacher", source, *options, *SMALL)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch-size", 0), "--batch-size must be a whole number from 1 to 2,147,483,647, not 0."),
        (("--batch-size", 9), "--batch-size must be a whole number from 1 to 8, not 9."),
        (("--lr", "nan"), "--lr must be a number above 0, not nan."),
        (("--lr", "inf"), "--lr must be a number above 0, not inf."),
        (("--lr", -1), "--lr must be a number above 0, not -1.0."),
        (("--steps", 0), "--steps must be a whole number from 1 to 2,147,483,647, not 0."),
        (("--steps", -1), "--steps must be a whole number from 1 to 2,147,483,647, not -1."),
        (("--match-steps", -1), "--match-steps must be a whole number from 0 to 2,147,483,647, not -1."),
        (("--lora-alpha", "nan"), "--lora-alpha must be a number above 0, not nan."),
        (("--length", 0), "--length must be a whole number from 16 to 2,147,483,647, not 0."),
        (("--sequences", 0), "--sequences must be a whole number from 8 to 1,048,576, not 0."),
        (("--data", "nothing.txt"), "nothing.txt cannot be read (No such file or directory)"),
        (("--text", "nothing.txt"), "nothing.txt cannot be read (No such file or directory)"),
        (("--data", "."), ". cannot be read (Is a directory)"),
    ],
)
def test_options_of_healing_are_checked_before_a_model_is_looked_for(latentkv, options: tuple, message: str) -> None:
    result = latentkv("heal", "no folder", "--teacher", "no source", *SMALL, *options)
    assert result.exit_code == 2 and result.stderr.startswith(f"error: {message}"), result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("case", ["itself", "a file", "not empty", "below a file", "dead link"])
def test_where_a_conversion_cannot_be_written_is_said_before_the_source_writes_text(
    latentkv, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dead").symlink_to(tmp_path / "gone")
    target, words = {
        "itself": (source, "is the source itself"),
        "a file": (tmp_path / "file", "is a file, not a folder"),
        "not empty": (tmp_path, "is not empty"),
        "below a file": (tmp_path / "file" / "out", "is a file, not a folder"),
        "dead link": (tmp_path / "dead", "is a link that leads nowhere"),
    }[case]

    def writes(*_: object, **__: object) -> None:
        raise AssertionError("text was written")

    monkeypatch.setattr("latentkv.convert.text.load_writer", writes)
    result = latentkv("convert", source, target, "--kv-budget", "1/2", *SMALL)
    assert result.exit_code == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "kept" and not (source / ".converting").exists()


def test_a_teacher_that_is_the_target_is_refused_before_text_is_written(
    latentkv, source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert latentkv("convert", source, out, *SIZES, "--calibrate", text, *SMALL).exit_code == 0

    def writes(*_: object, **__: object) -> None:
        raise AssertionError("text was written")

    monkeypatch.setattr("latentkv.convert.text.load_writer", writes)
    result = latentkv("heal", out, "--teacher", out, "--data", "self", *SMALL)
    assert result.exit_code == 2 and "is the teacher itself" in result.stderr
    report = (out / REPORT_FILE).read_text()
    worse = latentkv("heal", out, "--teacher", source, "--data", text, "--steps", 1, "--lr", 50, *SMALL)
    assert worse.exit_code == 2 and "so it stays as it was: give a lower --lr than 50" in worse.stderr
    assert len(worse.stderr.splitlines()) == 1 and (out / REPORT_FILE).read_text() == report


@pytest.mark.skipif(sys.platform == "win32", reason="folders are locked where POSIX is")
def test_a_model_that_another_process_heals_is_left_alone(latentkv, source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert latentkv("convert", source, out, *SIZES, "--calibrate", text, *SMALL).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with alone_in(out, TrainingError):
        result = latentkv("heal", out, "--teacher", source, "--data", "self", "--steps", 1, *SMALL)
    assert result.exit_code == 2 and "out is being written by another process: wait for its end" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_text_that_the_conversion_was_measured_on_and_that_is_gone_is_named(
    latentkv, source: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / REPORT_FILE).write_text(json.dumps({"quality": {"text": "gone.txt", "sequences": 8, "length": 32}}))
    result = latentkv("heal", tmp_path, "--teacher", source, "--data", text, *SMALL)
    assert result.exit_code == 2 and "gone.txt, which the conversion was measured on" in result.stderr


def test_a_copy_for_vllm_says_who_reads_it(latentkv, source: Path, text: Path, tmp_path: Path) -> None:
    asked = ("convert", source, tmp_path / "out", "--kv-budget", "1/2", "--export", "vllm", "--calibrate", text, *SMALL)
    result = latentkv(*asked)
    assert result.exit_code == 0, result.stderr
    printed = " ".join(result.stdout.split())
    assert "for latentkv, vllm, transformers, and no other engine" in printed
    assert "vLLM caches latents of 320, 512, 576 numbers, not 32: with VLLM_MLA_DISABLE=1" in printed
    assert json.loads((tmp_path / "out" / REPORT_FILE).read_text())["export"] == "vllm"


WRONG = [
    ((), "either --rank or --kv-budget"),
    (("--kv-budget", "1/2", "--method", "magic"), "--method=magic is not known: choose weighted, transmla, svd"),
    (("--kv-budget", "1/2", "--method", "svd"), "method=svd needs a rope_dim"),
    (("--kv-budget", "1/2", "--export", "onnx"), "--export=onnx is not known: choose transformers, vllm"),
    (("--rank", 16, "--rope-dim", 18, "--export", "vllm"), "--rope-dim=18 is not allowed with --export vllm"),
    (("--kv-budget", "half"), "--kv-budget: 'half' is no share"),
    (("--kv-budget", "1/0"), "is no share"),
    (("--kv-budget", "nan"), "--kv-budget must be a number above 0 and at most 1, not nan."),
    (("--kv-budget", "1e999999999"), "--kv-budget must be a number above 0 and at most 1, not inf."),
    (("--kv-budget", "-1/4"), "--kv-budget must be a number above 0 and at most 1, not -0.25."),
    (("--kv-budget", "1/2", "--length", 0), "--length must be a whole number from 16 to"),
    (("--kv-budget", "1/2", "--fold", 0), "--fold must be a whole number from 1 to"),
    (("--rank", 0, "--rope-dim", 8), "--rank must be a whole number from 1 to"),
    (("--kv-budget", "1/2", "--sequences", 4), "--sequences must be a whole number from 8 to 1,048,576, not 4."),
    (("--kv-budget", "1/2", "--length", 4096), "--length must be a whole number from 16 to 128, not 4096."),
    (("--kv-budget", "1/2", "--threads", 0), "--threads must be a whole number from 1 to 1,024, not 0."),
    (("--kv-budget", "1/2", "--calibrate", "nothing.txt"), "nothing.txt cannot be read"),
    (("--kv-budget", "1/2", "--calibrate", "{text}", "--sequences", 999), "are needed: give a longer text"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_usage_is_one_sentence_and_nothing_is_written(
    latentkv, source: Path, text: Path, tmp_path: Path, options: tuple, message: str
) -> None:
    small = {"--sequences": 8, "--length": 32}
    filled = [str(option).format(text=text) for option in options]
    rest = [part for name, value in small.items() if name not in filled for part in (name, value)]
    result = latentkv("convert", source, tmp_path / "out", *filled, *rest)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_takes_no_text(latentkv, source: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    asked = ("convert", tmp_path / "bare", tmp_path / "out", "--kv-budget", "1/2", "--calibrate", text, *SMALL)
    result = latentkv(*asked)
    assert result.exit_code == 2 and "has no tokenizer" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_that_was_not_converted_is_not_healed(latentkv, source: Path, text: Path) -> None:
    result = latentkv("heal", source, "--teacher", source, "--data", text, "--steps", 2, *SMALL)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
