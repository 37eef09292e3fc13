"""`generation_config.json` as defaults of sampling, for the library, the command line and the server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from command_line import run_here
from latentkv import LLM, SamplingParams
from latentkv.errors import ConfigError
from latentkv.generation_config import describe, sampling_defaults
from latentkv.llm_options import EMBEDDED_MODEL
from live_server import ask, serving

RECOMMENDED = {"temperature": 0.3, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.2}


def write(folder: Path, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def recommending(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with recommendations beside it."""
    folder = tmp_path_factory.mktemp("model") / "recommending"
    shutil.copytree(EMBEDDED_MODEL, folder)
    return write(folder, do_sample=True, max_new_tokens=5, **RECOMMENDED)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {}),
        (RECOMMENDED, RECOMMENDED),
        ({"temperature": None, "top_p": 0.5, "eos_token_id": 2}, {"top_p": 0.5}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.1},
         {"temperature": 0.0, "repetition_penalty": 1.1}),
        ({"do_sample": None}, {}),
    ],
)  # fmt: skip
def test_what_a_file_recommends_is_read(tmp_path: Path, settings: dict, expected: dict) -> None:
    folder = write(tmp_path / "m", **settings)
    assert sampling_defaults("auto", folder) == expected
    assert sampling_defaults(folder / "generation_config.json", tmp_path) == expected
    assert sampling_defaults(folder, tmp_path) == expected
    assert sampling_defaults("none", folder) == {}


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1}, {"temperature": "hot"}, {"top_p": 0}, {"top_k": 2.5}, {"repetition_penalty": True}],
)
def test_a_value_that_cannot_be_is_refused_with_its_file_and_the_way_out(tmp_path: Path, settings: dict) -> None:
    folder = write(tmp_path / "m", **settings)
    with pytest.raises(ConfigError, match=rf"_config\.json: {next(iter(settings))}=.*generation_config=.none"):
        sampling_defaults("auto", folder)


def test_a_model_without_the_file_recommends_nothing_and_one_that_is_named_must_be_there(tmp_path: Path) -> None:
    assert sampling_defaults("auto", tmp_path) == {}
    with pytest.raises(ConfigError, match=r"There is no .*generation_config"):
        sampling_defaults(tmp_path / "nowhere", tmp_path)


def test_defaults_fill_in_what_is_left_open_and_nothing_else() -> None:
    params = SamplingParams(temperature=1.0, max_tokens=7).with_defaults(RECOMMENDED)
    assert (params.temperature, params.top_p, params.max_tokens) == (1.0, 0.9, 7)
    assert SamplingParams().choice.temperature == 1.0
    assert describe(RECOMMENDED) == "temperature 0.3, top_p 0.9, top_k 20, repetition_penalty 1.2"


def test_library_command_line_and_server_sample_alike_by_the_models_defaults(recommending: Path) -> None:
    prompt, asked = "It was a dark night", {"max_tokens": 16, "seed": 4}
    llm = LLM(recommending, dtype="fp32", kv_cache_bytes=4 << 20)
    assert llm.sampling_defaults == RECOMMENDED
    (expected,) = llm.generate(prompt, SamplingParams(**asked, **RECOMMENDED))
    assert llm.generate(prompt, SamplingParams(**asked))[0].text == expected.text
    plain = LLM(recommending, dtype="fp32", kv_cache_bytes=4 << 20, generation_config="none")
    neutral = plain.generate(prompt, SamplingParams(**asked))[0].text
    assert neutral != expected.text
    assert neutral == llm.generate(prompt, SamplingParams(**asked, temperature=1, top_p=1, top_k=0,
                                                          repetition_penalty=1))[0].text  # fmt: skip
    with serving(llm) as live:
        body = {"prompt": prompt, **asked}
        assert ask(live, "/v1/completions", body)[1]["choices"][0]["text"] == expected.text
        assert ask(live, "/v1/completions", {**body, "temperature": 1, "top_p": 1, "top_k": -1,
                                             "repetition_penalty": 1})[1]["choices"][0]["text"] == neutral  # fmt: skip
        assert ask(live, "/stats")[1]["sampling_defaults"] == RECOMMENDED
        response = ask(live, "/v1/responses", {"input": "x", "max_output_tokens": 2})[1]
        assert (response["temperature"], response["top_p"]) == (0.3, 0.9)


def test_the_command_line_says_what_the_model_recommends(recommending: Path) -> None:
    words = ["generate", "It was a dark night", "-m", str(recommending), "-n", "16", "--seed", "4", "--dtype", "fp32"]
    said = run_here(*words)
    assert "generation_config.json: temperature 0.3, top_p 0.9, top_k 20" in " ".join(said.stderr.split())
    without = run_here(*words, "--generation-config", "none")
    assert "generation_config.json" not in without.stderr
    assert without.stdout != said.stdout
    own = ["--temperature", "0.8", "--top-p", "0.95", "--top-k", "0", "--repetition-penalty", "1"]
    assert run_here(*words, *own).stdout == without.stdout
