"""What `inspect` says of a checkpoint is what loading it says."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentkv.cli.checkpoint_facts import read_facts
from latentkv.errors import CheckpointError, ConfigError
from latentkv.models.loading import load_model
from latentkv.plan import load_config
from latentkv.weights.files.dtypes import STORED

NORM = "model.norm.weight"


def store_as(folder, name, dtype):
    """Rewrite the model's file with one tensor in another dtype, its bytes zero."""
    content = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    kept = {n: (entry, body[slice(*entry["data_offsets"])]) for n, entry in header.items() if n != "__metadata__"}
    entry = kept[name][0] | {"dtype": dtype}
    kept[name] = (entry, bytes(STORED[dtype].nbytes(entry["shape"])))
    described, whole = {}, b""
    for n, (entry, data) in kept.items():
        described[n] = entry | {"data_offsets": [len(whole), len(whole) + len(data)]}
        whole += data
    encoded = json.dumps(described).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + whole)


@pytest.mark.parametrize("dtype", STORED)
def test_inspect_and_loading_agree_on_every_dtype(copied_model, dtype):
    store_as(copied_model, NORM, dtype)
    facts = read_facts(copied_model)
    tensor = next(tensor for tensor in facts.tensors if tensor.name == NORM)
    assert (tensor.dtype, tensor.bytes) == (STORED[dtype].shown, STORED[dtype].nbytes((32,)))
    assert load_config(str(copied_model)).vocab_size == facts.vocab_size
    if dtype in ("F64", "F32", "F16", "BF16"):
        assert facts.problem is None
        load_model(copied_model)
    else:
        with pytest.raises(CheckpointError) as refused:
            load_model(copied_model)
        assert facts.problem == str(refused.value)
        assert NORM in facts.problem


@pytest.mark.parametrize("dtype", STORED)
def test_dtypes_of_a_vision_tower_are_nobodys_business(copied_model, dtype):
    tensors = {f"language_model.{n}": t for n, t in load_file(copied_model / "model.safetensors").items()}
    save_file(tensors | {"vision_tower.x": torch.ones(32)}, copied_model / "model.safetensors")
    store_as(copied_model, "vision_tower.x", dtype)
    facts = read_facts(copied_model)
    assert facts.problem is None
    assert next(t for t in facts.tensors if t.name == "vision_tower.x").kind == "other"
    load_model(copied_model)


def test_a_named_dtype_that_cannot_be_run_in_is_refused_by_all_alike(edit_config):
    folder = edit_config(dtype="float64")
    for look in (read_facts, load_model):
        with pytest.raises(ConfigError, match="float64"):
            look(folder)


def test_inspect_prints_why_a_checkpoint_will_not_load(latentkv, copied_model):
    store_as(copied_model, NORM, "I8")
    shown = latentkv("inspect", copied_model)
    assert shown.exit_code == 0
    assert "will not load" in shown.stdout
    assert "expected floating point, found int8" in " ".join(shown.stdout.split())
    assert json.loads(latentkv("inspect", copied_model, "--json").stdout)["problem"]


def test_a_tied_embedding_stored_as_head_is_counted_as_the_embedding(copied_model):
    tensors = load_file(copied_model / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, copied_model / "model.safetensors")
    config = json.loads((copied_model / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (copied_model / "config.json").write_text(json.dumps(config))
    facts = read_facts(copied_model)
    assert facts.problem is None
    assert facts.parameters_stored == facts.parameters
    assert next(t for t in facts.tensors if t.name == "lm_head.weight").kind == "embedding"
