"""A folder, its config.json, a repo id and a revision of it mean the same in every command."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

pytestmark = pytest.mark.usefixtures("unpainted")


@pytest.fixture
def forms(copied_model, tmp_path, monkeypatch):
    """One model in every form, the repository's in a hub's cache folder."""
    repo, commit = tmp_path / "hub" / "models--org--tiny", "a" * 40
    (repo / "refs").mkdir(parents=True)
    for name in ("main", "v1"):
        (repo / "refs" / name).write_text(commit)
    (repo / "snapshots").mkdir()
    (repo / "snapshots" / commit).symlink_to(copied_model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return (copied_model, copied_model / "config.json", "org/tiny", "org/tiny@v1")


def output(latentkv, *args):
    result = latentkv(*args)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_generate_plan_and_inspect_take_every_form(latentkv, forms):
    asked = ("generate", "The whale", "-n", 4, "--seed", 1, "--json", "--model")
    assert len({output(latentkv, *asked, form)["text"] for form in forms}) == 1
    plans = [output(latentkv, "plan", form, "--json", "--memory", "1GiB") for form in forms]
    assert all({**plan, "model": ""} == {**plans[0], "model": ""} for plan in plans)
    facts = [output(latentkv, "inspect", form, "--json") for form in forms]
    assert all({**fact, "folder": ""} == {**facts[0], "folder": ""} for fact in facts)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("inspect", "{}", "--json"), ("inspect", "--json", "--model", "{}")),
        (("plan", "{}", "--json", "--memory", "1GiB"), ("plan", "--json", "--memory", "1GiB", "-m", "{}")),
    ],
)
def test_a_model_is_an_argument_or_an_option(latentkv, forms, words, told):
    for form in forms:
        both = [output(latentkv, *(word.format(form) for word in each)) for each in (words, told)]
        assert both[0] == both[1]


def test_quantize_takes_its_model_by_the_option_too(latentkv, forms, tmp_path):
    assert latentkv("quantize", tmp_path / "a", "--model", forms[3], "--weights", "int8").exit_code == 0
    assert latentkv("quantize", forms[3], tmp_path / "b", "--weights", "int8").exit_code == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    refused = latentkv("quantize", forms[3], tmp_path / "c", "-m", forms[3], "--weights", "int8")
    assert refused.exit_code == 2 and "MODEL is given twice" in refused.output


def test_a_shape_needs_its_config_alone_and_weights_are_missed_by_name(latentkv, forms, tmp_path):
    alone = tmp_path / "alone" / "config.json"
    alone.parent.mkdir()
    alone.write_bytes(forms[1].read_bytes())
    assert output(latentkv, "plan", alone, "--json", "--memory", "1GiB")["parameters"]
    for command in ("generate", "inspect", "quantize"):
        options = {"generate": ("Hi", "-m", alone), "inspect": (alone,)}
        quantize = (alone, tmp_path / "q", "--weights", "int8")
        refused = latentkv(command, *options.get(command, quantize))
        assert refused.exit_code == 2
        assert "has no weights" in refused.stderr


def test_quantize_takes_every_form(latentkv, forms, tmp_path):
    for i, form in enumerate(forms):
        target = tmp_path / f"q{i}"
        assert latentkv("quantize", form, target, "--weights", "int8").exit_code == 0
        assert (target / "model.safetensors").read_bytes() == (tmp_path / "q0" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("option", ["config", "init"])
def test_train_takes_files_and_revisions(latentkv, forms, tmp_path, option):
    (tmp_path / "text.txt").write_text("The whale swam on, and the harpooner watched it from the mast. " * 60)
    losses = set()
    for i, form in enumerate((forms[1], forms[3])):
        out = tmp_path / f"{option}{i}"
        named = (form, "--tokenizer", form) if option == "config" else ("--init", form)
        limits = ("--steps", 1, "--seq-len", 16, "--batch-tokens", 32, "--micro-batch", 2, "--dtype", "fp32")
        result = latentkv("train", *named, "--data", tmp_path / "text.txt", "--out", out, *limits)
        assert result.exit_code == 0, result.stderr
        losses.add(json.dumps(json.loads((out / "training.json").read_text())["bits_per_byte"]))
    assert len(losses) == 1


@pytest.mark.parametrize(
    ("command", "before"),
    [
        ("generate", ("Hi", "-m")),
        ("chat", ("-m",)),
        ("serve", ("--port", 0)),
        ("plan", ()),
        ("inspect", ()),
        ("quantize", ("--weights", "int8")),
        ("convert", ("--kv-budget", "1/2")),
        ("heal", ("--teacher",)),
        ("train", ("--data", ".", "--steps", 1, "--init")),
        ("train", ("--data", ".", "--steps", 1)),
        ("chat", ()),
        ("serve", ("--port", 0, "--model")),
        ("train", ("--data", ".", "--steps", 1, "--model")),
        ("bench model", ()),
        ("bench speculation", ()),
    ],
)
@pytest.mark.parametrize("model", ["org/tiny@v9", "gone/config.json"])
def test_a_model_that_is_nowhere_gets_the_same_sentence_from_every_command(
    latentkv, forms, tmp_path, command, before, model
):
    model = str(tmp_path / model) if model.startswith("gone") else model
    after = {"quantize": [tmp_path / "t"], "convert": [tmp_path / "t"], "heal": [Path(forms[0])]}
    refused = latentkv(*command.split(), *before, model, *after.get(command, []))
    assert refused.exit_code == 2
    assert "no folder" in refused.stderr
    assert model in refused.stderr
