"""Bad input is one sentence that names the thing, exit code 2, and a traceback only with --debug."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentkv.errors import CheckpointError, ConfigError, LatentKVError, RequestError, TokenizerError, TrainingError
from latentkv.text.bpe_trainer import save_tokenizer, train_bpe

WEIGHTS = "model.safetensors"


def change_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def refused(latentkv, error, *args, names=()):
    """Check both faces of one refusal: the sentence, and with --debug the error itself."""
    result = latentkv(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: "), result.stderr
    assert result.stderr.count("\n") == 1
    for name in names:
        assert str(name) in result.stderr
    debug = latentkv("--debug", *args)
    assert isinstance(debug.exception, error), debug.exception
    assert isinstance(debug.exception, LatentKVError)


@pytest.mark.parametrize("command", [["generate", "hello", "-m"], ["chat", "-m"], ["inspect"], ["plan"]])
def test_a_missing_folder(latentkv, tmp_path, command):
    refused(latentkv, ConfigError, *command, tmp_path / "nothing here", names=["nothing here"])


@pytest.mark.parametrize("command", [["generate", "hello", "-m"], ["chat", "-m"], ["inspect"], ["plan"]])
def test_a_folder_without_config(latentkv, tmp_path, command):
    refused(latentkv, ConfigError, *command, tmp_path, names=[tmp_path, "config.json"])


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\xff"])
@pytest.mark.parametrize("command", [["generate", "hello", "-m"], ["inspect"], ["plan"]])
def test_a_damaged_config(latentkv, copied_model, command, text):
    (copied_model / "config.json").write_text(text)
    refused(latentkv, ConfigError, *command, copied_model, names=["config.json"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "bert"}, "bert"),
        ({"kv_lora_rank": "wide"}, "kv_lora_rank"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_an_unsupported_config(latentkv, edit_config, change, named):
    refused(latentkv, ConfigError, "generate", "hello", "-m", edit_config(**change), names=[named])


@pytest.mark.parametrize("command", [["generate", "hello", "-m"], ["inspect"]])
def test_a_corrupt_weights_file(latentkv, copied_model, command):
    (copied_model / WEIGHTS).write_bytes(b"these are no weights" * 20)
    refused(latentkv, CheckpointError, *command, copied_model, names=[WEIGHTS])


@pytest.mark.parametrize("command", [["generate", "hello", "-m"], ["inspect"]])
@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
def test_a_truncated_weights_file(latentkv, copied_model, command, keep):
    content = (copied_model / WEIGHTS).read_bytes()
    size = int(len(content) * keep) if isinstance(keep, float) else keep
    (copied_model / WEIGHTS).write_bytes(content[:size])
    refused(latentkv, CheckpointError, *command, copied_model, names=[WEIGHTS])


@pytest.mark.parametrize("command", [["generate", "hello", "-m"], ["inspect"]])
def test_a_folder_without_weights(latentkv, copied_model, command):
    (copied_model / WEIGHTS).unlink()
    refused(latentkv, CheckpointError, *command, copied_model, names=["model.safetensors"])


def test_a_missing_tensor(latentkv, copied_model):
    change_weights(copied_model, lambda tensors: tensors.pop("model.norm.weight"))
    refused(latentkv, CheckpointError, "generate", "hello", "-m", copied_model, names=["model.norm.weight"])


def test_an_unexpected_tensor(latentkv, copied_model):
    change_weights(copied_model, lambda tensors: tensors.update({"model.extra.weight": torch.zeros(2)}))
    refused(latentkv, CheckpointError, "generate", "hello", "-m", copied_model, names=["model.extra.weight"])


def test_a_tensor_of_the_wrong_shape(latentkv, copied_model):
    name = "model.layers.1.self_attn.o_proj.weight"
    change_weights(copied_model, lambda tensors: tensors.update({name: torch.zeros(32, 33)}))
    refused(latentkv, CheckpointError, "generate", "hello", "-m", copied_model, names=[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number(latentkv, copied_model, value):
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(copied_model, lambda tensors: tensors[name][3].fill_(value))
    refused(latentkv, CheckpointError, "generate", "hello", "-m", copied_model, names=[name])


def test_a_prompt_longer_than_the_context(latentkv, model_folder):
    refused(latentkv, RequestError, "generate", "whale " * 400, "-m", model_folder, names=["256"])


def test_a_prompt_longer_than_the_asked_context(latentkv, model_folder):
    args = ["generate", "whale " * 40, "-m", model_folder, "--max-context", 16]
    refused(latentkv, RequestError, *args, names=["16"])


def test_an_empty_prompt(latentkv, model_folder):
    refused(latentkv, RequestError, "generate", "", "-m", model_folder, names=["empty"])


@pytest.mark.parametrize("command", [["generate", "-"], ["chat"]])
def test_a_stdin_that_is_no_text(latentkv, model_folder, command):
    result = latentkv(*command, "-m", model_folder, input=b"na\xefve\n")
    assert result.exit_code == 2, result.exception
    assert "UTF-8" in result.stderr.splitlines()[-1]


def test_an_empty_stdin(latentkv, model_folder):
    refused(latentkv, RequestError, "generate", "-", "-m", model_folder, names=["empty"])


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--temperature", "-0.1", "temperature"),
        ("--temperature", "nan", "temperature"),
        ("--top-p", "0", "top_p"),
        ("--top-p", "1.5", "top_p"),
        ("--top-k", "-1", "top_k"),
        ("--min-p", "2", "min_p"),
        ("--repetition-penalty", "0", "repetition_penalty"),
        ("--max-tokens", "0", "max_tokens"),
        ("--seed", "-1", "seed"),
        ("--stop", "", "stop"),
        ("--logprobs", "-1", "logprobs"),
        ("--logprobs", "9999", "logprobs"),
        ("--kv-dtype", "fp4", "fp4"),
        ("--dtype", "int8", "int8"),
        ("--device", "abacus", "abacus"),
        ("--max-context", "1000", "1000"),
        ("--max-context", "much", "much"),
        ("--kv-cache-bytes", "much", "much"),
        ("--kv-cache-bytes", "10", "10"),
    ],
)
def test_an_option_out_of_range(latentkv, model_folder, option, value, named):
    refused(latentkv, LatentKVError, "generate", "hello", "-m", model_folder, option, value, names=[named])


@pytest.mark.parametrize("ids", ["5 320", "5 -- -1", "5 1000000000000"])
def test_token_ids_outside_the_vocabulary(latentkv, model_folder, ids):
    words = ids.split()
    named = words[-1]
    refused(latentkv, RequestError, "generate", "-m", model_folder, "--token-ids", *words, names=[named, "vocabulary"])


def test_words_where_token_ids_belong(latentkv, model_folder):
    refused(latentkv, RequestError, "generate", "-m", model_folder, "--token-ids", "hello", names=["hello"])


def test_a_tokenizer_with_more_tokens_than_the_model(latentkv, copied_model):
    text = "".join(chr(c) * 3 + " " for c in range(0x4E00, 0x4F00))
    save_tokenizer(train_bpe([text] * 5, 500), copied_model)
    refused(latentkv, TokenizerError, "generate", "hello", "-m", copied_model, names=["tokenizer"])


def test_a_damaged_tokenizer(latentkv, copied_model):
    (copied_model / "tokenizer.json").write_text("{}")
    refused(latentkv, TokenizerError, "generate", "hello", "-m", copied_model, names=["tokenizer.json"])


def test_words_for_a_model_without_tokenizer(latentkv, copied_model):
    (copied_model / "tokenizer.json").unlink()
    refused(latentkv, RequestError, "generate", "hello", "-m", copied_model, names=["token ids"])


def test_chat_with_a_model_without_tokenizer(latentkv, copied_model):
    (copied_model / "tokenizer.json").unlink()
    result = latentkv("chat", "-m", copied_model, input="hello\n")
    assert result.exit_code == 2
    assert "tokenizer" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("option", [("--context", "long"), ("--memory", "lots"), ("--batch", 0), ("--kv-dtype", "fp4")])
def test_plans_of_the_impossible(latentkv, option):
    refused(latentkv, RequestError, "plan", "deepseek-v3", *option, names=option[1:])


def test_a_plan_of_a_quantised_key_value_cache(latentkv, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refused(latentkv, LatentKVError, "plan", tmp_path, "--kv-dtype", "fp8", names=["fp8"])


@pytest.mark.parametrize(("option", "value"), [("--threads", 0), ("--steps", 0), ("--dtype", "int8")])
def test_training_options_out_of_range(latentkv, tmp_path, option, value):
    (tmp_path / "config.json").write_text("{}")
    args = ["train", tmp_path, "--data", tmp_path, "--out", tmp_path / "out"]
    args += [] if option == "--steps" else ["--steps", 1]
    error = RequestError if option == "--threads" else TrainingError  # every command refuses it in the same words
    refused(latentkv, error, *args, option, value, names=[option, value])
    assert not (tmp_path / "out").exists()
