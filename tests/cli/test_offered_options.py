"""What commands offer: those that run a model the same options, under our names and the field's."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
import typer

from latentkv import LLM, SamplingParams
from latentkv.cli.app import make_app
from latentkv.cli.generate import generate
from latentkv.errors import ConfigError
from latentkv.options import CacheOptions, LLMOptions, ModelOptions

ROOT = typer.main.get_command(make_app())
NOT_OFFERED = {"step_seconds"}


def flags_of(*path: str) -> dict[str, str]:
    """By flag, the name of what it sets."""
    command = ROOT
    for word in path:
        command = command.commands[word]
    return {flag: option.name for option in command.params for flag in option.opts if flag.startswith("-")}


@pytest.mark.parametrize("command", ["generate", "chat", "serve", "run", "run-batch"])
def test_every_option_of_a_model_is_one_of_each_command_that_runs_it(command):
    wanted = {f"--{field.name.replace('_', '-')}" for field in fields(LLMOptions) if field.name not in NOT_OFFERED}
    assert wanted <= flags_of(command).keys()


@pytest.mark.parametrize("command", ["model", "speculation", "server-cost", "start", "tensor-parallel"])
def test_a_benchmark_of_a_model_takes_what_concerns_one_process_on_cpus(command):
    elsewhere = {
        "start": {"packed_dir", "packed_dir_bytes"},
        "tensor-parallel": {"max_context", "cache_dir", "cache_dir_bytes"},
    }
    names = {field.name for kind in (ModelOptions, CacheOptions) for field in fields(kind)} - {"device"}
    wanted = {f"--{name.replace('_', '-')}" for name in names - elsewhere.get(command, set())}
    assert wanted <= flags_of("bench", command).keys()


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_answers_are_sampled_as_asked_by_every_command_that_shows_one(command):
    wanted = (
        "temperature",
        "top-p",
        "top-k",
        "min-p",
        "repetition-penalty",
        "seed",
        "stop",
        "min-tokens",
        "max-tokens",
    )
    assert {f"--{name}" for name in wanted} <= flags_of(command).keys()


@pytest.mark.parametrize(
    "path",
    [
        *(("generate",), ("chat",), ("serve",), ("plan",), ("inspect",), ("quantize",), ("convert",), ("train",)),
        *(("bench", name) for name in ("model", "speculation", "server-cost", "start", "tensor-parallel", "sparse")),
    ],
)
def test_a_model_is_named_by_the_same_option_everywhere(path):
    flags = flags_of(*path)
    assert flags["--model"] == flags["-m"]


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        *((name, "max_context") for name in ("-c", "--ctx-size", "--max-model-len", "--max-context")),
        ("--kv-cache-dtype", "kv_dtype"),
        ("--max-num-seqs", "max_running"),
        ("--served-model-name", "name"),
        ("--tensor-parallel-size", "tensor_parallel"),
        ("--pipeline-parallel-size", "pipeline_parallel"),
    ],
)
def test_the_fields_names_are_taken_as_well(name, ours):
    assert flags_of("serve")[name] == ours


def test_the_version_has_a_short_flag(latentkv):
    assert latentkv("-V").output == latentkv("--version").output


def test_a_shell_can_ask_for_what_completes_a_word(latentkv):
    asked = {"_ROOT_COMPLETE": "complete_bash", "COMP_WORDS": "latentkv serve --max-r", "COMP_CWORD": "2"}
    completed = latentkv(env=asked, prog_name="root")
    assert completed.output.split() == ["--max-running"]


def test_llm_takes_the_fields_by_name_and_says_so():
    parameters = inspect.signature(LLM).parameters
    assert list(parameters) == [field.name for field in fields(LLMOptions)]
    assert parameters["model"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    with pytest.raises(TypeError, match="wieghts"):
        LLM(wieghts="int8")  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [("float32", "fp32"), ("torch.bfloat16", "bfloat16"), ("half", "float16"), ("auto", "auto"), ("float", "fp8_e4m3")],
)
def test_dtypes_have_the_names_that_others_give_them(model_folder, dtype, kv_dtype):
    llm = LLM(model_folder, dtype=dtype, kv_dtype=kv_dtype, kv_cache_bytes=1 << 20)
    assert str(llm.decoder.dtype) in {"torch.float32", "torch.bfloat16", "torch.float16"}
    names = {"bfloat16": "bf16", "float16": "fp16", "auto": "fp32", "fp8_e4m3": "fp8"}
    assert llm.cache.format == names.get(kv_dtype, kv_dtype)


def test_plan_knows_these_names_too(latentkv):
    asked = ("plan", "deepseek-v3", "-c", "4k", "--json", "--memory", "1GiB")
    ours = latentkv(*asked, "--kv-dtype", "fp16", "--weights-dtype", "bf16")
    theirs = latentkv(*asked, "--kv-cache-dtype", "half", "--weights-dtype", "bfloat16")
    assert ours.exit_code == 0 and ours.output == theirs.output
    assert latentkv(*asked, "--weights-dtype", "auto").output == latentkv(*asked).output


def test_a_model_computes_with_the_threads_that_are_asked_for(model_folder):
    import torch

    for threads in (1, 2):
        llm = LLM(model_folder, threads=threads, kv_cache_bytes=1 << 20)
        assert len(llm.generate("It was", SamplingParams(max_tokens=2))[0].token_ids) == 2
        assert llm.thread.call(torch.get_num_threads) == threads
    with pytest.raises(ConfigError, match="--threads must be a whole number from 1 to 1,024, not 0"):
        LLM(model_folder, threads=0)


@pytest.mark.parametrize("command", ["generate hi -m", "chat", "serve --port 0", "inspect", "bench model"])
def test_a_built_in_shape_is_told_from_a_model(latentkv, command, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused = latentkv(*command.split(), "deepseek-v3")
    assert refused.exit_code == 2
    assert "deepseek-v3 is a built-in shape, which `latentkv plan` takes" in refused.stderr


def test_a_command_is_a_plain_function():
    assert list(inspect.signature(generate).parameters)[:4] == ["prompt", "sampling", "structure", "options"]
