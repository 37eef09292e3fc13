"""`latentkv generate` says what `LLM.generate` says."""

from __future__ import annotations

import json
import re

import pytest

from latentkv import LLM, SamplingParams
from latentkv.llm_options import EMBEDDED_MODEL
from latentkv.plan import mha_bytes

PROMPT = "The whale swam"


@pytest.fixture(scope="module")
def llm(model_folder):
    return LLM(model_folder)


def test_text_goes_to_stdout_and_the_summary_to_stderr(latentkv, model_folder, llm):
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=12, temperature=0))[0]
    result = latentkv("generate", PROMPT, "-m", model_folder, "-n", 12, "--temperature", 0)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == expected.text + "\n"
    assert "12 tokens" in result.stderr
    assert f"{llm.cache.bytes_per_token:,} bytes a token" in result.stderr
    assert f"{mha_bytes(llm.config):,}" in result.stderr
    assert result.stderr.count("\n") == 1


def test_without_streaming_the_text_is_the_same(latentkv, model_folder):
    args = ["generate", PROMPT, "-m", model_folder, "-n", 12, "--seed", 5]
    assert latentkv(*args, "--no-stream").stdout == latentkv(*args).stdout


def test_words_without_quotes_and_stdin_are_the_same_prompt(latentkv, model_folder):
    options = ["-m", model_folder, "-n", 8, "--temperature", 0]
    quoted = latentkv("generate", PROMPT, *options).stdout
    assert latentkv("generate", *PROMPT.split(), *options).stdout == quoted
    assert latentkv("generate", "-", *options, input=PROMPT).stdout == quoted


def test_json_is_the_whole_completion(latentkv, model_folder, llm):
    params = SamplingParams(max_tokens=9, temperature=0.7, top_p=0.9, top_k=40, seed=3, logprobs=2)
    expected = llm.generate(PROMPT, params)[0]
    result = latentkv(
        *("generate", PROMPT, "-m", model_folder, "-n", 9, "--temperature", 0.7, "--top-p", 0.9, "--top-k", 40),
        *("--seed", 3, "--logprobs", 2, "--json"),
    )
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["text"] == expected.text
    assert answer["token_ids"] == expected.token_ids
    assert answer["finish_reason"] == expected.finish_reason == "length"
    assert answer["seed"] == 3
    assert [entry["token_id"] for entry in answer["logprobs"]] == expected.token_ids
    assert answer["cache_bytes_per_token"] == llm.cache.bytes_per_token
    assert answer["mha_cache_bytes_per_token"] == 2 * 4 * (8 + 8 + 8) * 2


def test_a_seed_repeats_a_text(latentkv, model_folder):
    first = json.loads(latentkv("generate", PROMPT, "-m", model_folder, "-n", 20, "--json").stdout)
    again = latentkv("generate", PROMPT, "-m", model_folder, "-n", 20, "--json", "--seed", first["seed"])
    assert json.loads(again.stdout)["token_ids"] == first["token_ids"]


def test_a_stop_string_ends_the_text(latentkv, model_folder, llm):
    text = llm.generate(PROMPT, SamplingParams(max_tokens=30, temperature=0))[0].text
    stop = text[len(text) // 2 :][:2]
    result = latentkv("generate", PROMPT, "-m", model_folder, "-n", 30, "--temperature", 0, "--stop", stop)
    assert result.stdout == text[: text.index(stop)] + "\n"


def test_logprobs_are_shown_as_a_table(latentkv, model_folder):
    result = latentkv("generate", PROMPT, "-m", model_folder, "-n", 3, "--temperature", 0, "--logprobs", 1)
    assert result.exit_code == 0, result.stderr
    assert "log-probability" in result.stdout
    assert result.stdout.count("-") > 3


def test_a_text_of_a_given_form(latentkv, model_folder, tmp_path):
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_text('{"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2}')
    grammar.write_text('start: "<" /[a-c]{3}/ ">"')
    for option, value, pattern in (
        ("--json-schema", schema, r"\[\s*[12]\s*,\s*[12]\s*\]"),
        ("--regex", "[a-f]{4}", "[a-f]{4}"),
        ("--grammar", grammar, "<[a-c]{3}>"),
    ):
        result = latentkv("generate", PROMPT, "-m", model_folder, "-n", 200, "--seed", 1, option, value)
        assert result.exit_code == 0, result.stderr
        assert re.fullmatch(pattern + "\n", result.stdout)
    result = latentkv("generate", PROMPT, "-m", model_folder, "--seed", 1, "--choice", "yes", "--choice", "no")
    assert result.stdout in ("yes\n", "no\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--regex", "a", "--choice", "b"], "--regex and --choice cannot be had together: give one of them"),
        (["--json-schema", "nowhere.json"], "Cannot read nowhere.json as text"),
        (["--regex", "(a"], "The regular expression cannot be used: unclosed group"),
        (["--choice", ""], "none of them empty"),
    ],
)
def test_a_form_that_cannot_be_had_is_one_line(latentkv, model_folder, options, message):
    result = latentkv("generate", PROMPT, "-m", model_folder, *options)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_a_model_without_tokenizer_answers_in_token_ids(latentkv, copied_model, llm):
    (copied_model / "tokenizer.json").unlink()
    expected = llm.generate([5, 6, 7], SamplingParams(max_tokens=4, temperature=0))[0].token_ids
    result = latentkv("generate", "5", "6", "7", "--token-ids", "-m", copied_model, "-n", 4, "--temperature", 0)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == " ".join(map(str, expected)) + "\n"


@pytest.mark.parametrize(("kv_dtype", "per_token"), [("int8", 2 * 32), ("bf16", 2 * 48), ("fp32", 2 * 96)])
def test_the_cache_is_stored_and_sized_as_asked(latentkv, model_folder, kv_dtype, per_token):
    result = latentkv(
        *("generate", PROMPT, "-m", model_folder, "-n", 3, "--json"),
        *("--kv-dtype", kv_dtype, "--kv-cache-bytes", "64KiB", "--max-context", 128),
    )
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["cache_bytes_per_token"] == per_token
    assert 0 < answer["cache_allocated_bytes"] <= 64 * 1024


def test_the_weights_dtype_is_obeyed(latentkv, model_folder):
    half = json.loads(latentkv("generate", PROMPT, "-m", model_folder, "-n", 2, "--json", "--dtype", "bf16").stdout)
    full = json.loads(latentkv("generate", PROMPT, "-m", model_folder, "-n", 2, "--json").stdout)
    assert 2 * half["cache_bytes_per_token"] == full["cache_bytes_per_token"]


@pytest.mark.skipif(not (EMBEDDED_MODEL / "config.json").exists(), reason="no embedded model in this checkout")
def test_without_a_model_the_embedded_one_writes(latentkv):
    result = latentkv("generate", "It was a dark night", "-n", 16, "--seed", 1)
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.split()) > 3


def test_prompts_go_to_a_folder_and_come_back(latentkv, model_folder, tmp_path):
    prompt = " ".join(str(3 + number % 40) for number in range(270))
    args = ["generate", prompt, "--token-ids", "-n", 5, "--temperature", 0, "--max-context", 512, "--no-stream"]
    folder = {"max_position_embeddings": 512}
    config = json.loads((model_folder / "config.json").read_text())
    model = tmp_path / "model"
    model.mkdir()
    for file in model_folder.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "config.json").write_text(json.dumps(config | folder))
    plain = latentkv(*args, "-m", model)
    options = ["-m", model, "--cache-dir", tmp_path / "store", "--cache-dir-bytes", "1MiB"]
    first, second = latentkv(*args, *options), latentkv(*args, *options)
    assert plain.stdout == first.stdout == second.stdout
    assert "0 tokens of this model in 0 pages, 0 B of 1.00 MiB in use" in first.stderr
    assert "256 tokens of this model in 4 pages" in second.stderr


def test_a_folder_for_prompts_that_cannot_be_used_is_one_line(latentkv, model_folder, tmp_path):
    (tmp_path / "file").write_text("")
    result = latentkv("generate", PROMPT, "-m", model_folder, "--cache-dir", tmp_path / "file")
    assert result.exit_code == 2
    assert "cannot be used" in result.stderr and result.stderr.count("\n") == 1


def test_packed_weights_are_kept_where_the_options_say(latentkv, model_folder, tmp_path):
    args = ["generate", PROMPT, "-m", model_folder, "-n", 6, "--temperature", 0, "--dtype", "bf16"]
    expected = latentkv(*args, "--no-packed-dir").stdout
    for _ in range(2):
        assert latentkv(*args, "--packed-dir", tmp_path / "packed", "--packed-dir-bytes", "1GiB").stdout == expected
    assert len(list((tmp_path / "packed").iterdir())) == 1


def test_options_of_packed_weights_that_exclude_each_other_are_refused(latentkv, model_folder, tmp_path):
    for other in (["--packed-dir", tmp_path], ["--packed-dir-bytes", "1GiB"]):
        result = latentkv("generate", PROMPT, "-m", model_folder, "--no-packed-dir", *other)
        assert result.exit_code == 2
        assert re.search(r"--no-packed-dir\)? excludes", result.stderr)
