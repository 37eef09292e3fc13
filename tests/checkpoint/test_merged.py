"""Adapters are added to the weights that they were made for, in float32, and to nothing else."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from adapters import merged, write_adapter
from latentkv.checkpoint.adapter import Adapter
from latentkv.checkpoint.merged import MergedTensors
from latentkv.checkpoint.tensors import open_tensors
from latentkv.errors import CheckpointError
from stored_models import GQA, MLA, write_model

MLA_MODULES = [
    *(f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj")),
    *("model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.experts.3.up_proj"),
    "model.layers.1.mlp.shared_experts.gate_proj",
]
GQA_MODULES = [
    *(f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qkvo"),
    *("model.layers.1.mlp.gate_proj", "lm_head", "model.embed_tokens"),
]


@pytest.fixture(scope="module", params=["mla", "gqa"])
def model(request, tmp_path_factory):
    """(the folder of a model, modules of it)."""
    folder = tmp_path_factory.mktemp("model")
    return (
        (write_model(folder, MLA), MLA_MODULES) if request.param == "mla" else (write_model(folder, GQA), GQA_MODULES)
    )


def opened(folder, adapter, *, tied=False):
    return MergedTensors(open_tensors(folder), Adapter(adapter), tied=tied)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "fan_in_fan_out": True},  # the second is for layers that are stored transposed: none is
        {"rank_pattern": {"kv_b_proj": 2, "layers.0.self_attn.q_proj": 5}, "alpha_pattern": {"o_proj": 7.5}},
        {"alpha_pattern": {"self_attn.q_proj": 2, "q_proj": 9}, "use_rslora": True},
    ],
)
def test_weights_are_what_numpy_makes_of_them(model, tmp_path, config):
    folder, modules = model
    adapter = write_adapter(tmp_path / "adapter", folder, modules, **config)
    tensors, expected, plain = opened(folder, adapter), merged(folder, adapter), load_file(folder / "model.safetensors")
    changed = {f"{module}.weight" for module in modules}
    assert set(tensors.names) == expected.keys() >= changed
    for name, value in expected.items():
        found = tensors.read(name).numpy()
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-5)
        assert np.array_equal(found, plain[name]) == (name not in changed)


def test_a_weight_is_rounded_once(model, tmp_path):
    folder, modules = model
    adapter = write_adapter(tmp_path / "adapter", folder, modules)
    tensors = opened(folder, adapter)
    for module in modules:
        exact = tensors.read(f"{module}.weight", torch.float32)
        assert torch.equal(tensors.read(f"{module}.weight", torch.bfloat16), exact.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("in_files", "in_adapter"), [("language_model.model.", "model.language_model."), ("", "model.")]
)
def test_what_stands_before_a_name_does_not_count(model, tmp_path, in_files, in_adapter):
    folder, modules = model
    adapter, wrapped = write_adapter(tmp_path / "adapter", folder, modules[:4]), tmp_path / "wrapped"
    expected = merged(folder, adapter)
    wrapped.mkdir()
    renamed = {name.replace("model.", in_files, 1): t for name, t in load_file(folder / "model.safetensors").items()}
    save_file(renamed, wrapped / "model.safetensors")
    path = adapter / "adapter_model.safetensors"
    save_file({name.replace("model.model.", f"model.{in_adapter}", 1): t for name, t in load_file(path).items()}, path)
    for module in modules[:4]:
        found = opened(wrapped, adapter).read(f"{module}.weight".replace("model.", in_files, 1)).numpy()
        np.testing.assert_allclose(found, expected[f"{module}.weight"], rtol=1e-5, atol=1e-5)


def test_modules_that_were_saved_whole_take_the_places_of_the_models_own(model, tmp_path):
    folder, _ = model
    adapter = write_adapter(tmp_path / "adapter", folder, ["model.layers.0.self_attn.q_proj"], modules_to_save=["norm"])
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    norm = np.full(32, 0.5, np.float32)
    save_file({**tensors, "base_model.model.model.norm.weight": norm}, path)
    assert np.array_equal(opened(folder, adapter).read("model.norm.weight").numpy(), norm)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"modules_to_save names 'norm', which adapter_model\.safetensors lacks"):
        opened(folder, adapter)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "adapter of the kind 'IA3', and LORA alone"),
        ({"bias": "all"}, "has bias 'all', which is not supported here: merge it with peft"),
        ({"use_dora": True}, "has use_dora, which is not supported"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "has target_parameters, which is not supported"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights 'pissa_niter_4', which changes the model's own weights",
        ),
        ({"lora_alpha": "high"}, "lora_alpha has 'high' for a number"),
        ({"alpha_pattern": [1]}, "alpha_pattern is no object"),
        ({"r": 9}, "the rank 9, and its lora_A has 3: the two files belong to different adapters"),
    ],
)
def test_what_is_not_merged_is_refused_by_name(model, tmp_path, config, said):
    folder, modules = model
    adapter = write_adapter(tmp_path / "adapter", folder, modules)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(CheckpointError, match=said):
        opened(folder, adapter)


def zeros(*shape):
    return np.zeros(shape, np.float32)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "changes no weight"),
        ({f"{Q}.lora_A.weight": zeros(3, 32)}, r"has no lora_B of model\.layers\.0\.self_attn\.q_proj"),
        ({f"{Q}.lora_A.weight": zeros(3, 32), f"{Q}.lora_B.weight": zeros(8, 4)}, "do not fit each other"),
        (
            {f"{Q}.lora_A.weight": zeros(3, 31), f"{Q}.lora_B.weight": zeros(96, 3)},
            r"has the shape \[96, 31\], and model",
        ),
        ({f"{Q}.lora_magnitude_vector": zeros(3)}, "lora_magnitude_vector, which is not supported"),
        (
            {"base_model.model.model.layers.7.mlp.nothing.weight": zeros(2)},
            r"changes model\.layers\.7\.mlp\.nothing\.weight, which .* does not have: the adapter belongs to another",
        ),
        ({f"{Q}.weight": zeros(2)}, r"has the shape \[2\], and model.layers.0"),
        ({f"{Q}.lora_A.weight": np.zeros((3, 32), np.int8)}, "is stored as I8: floating point is needed"),
    ],
)
def test_files_that_do_not_fit_the_model_are_refused(model, tmp_path, tensors, said):
    folder, modules = model
    adapter = write_adapter(tmp_path / "adapter", folder, modules)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=said):
        opened(folder, adapter)


@pytest.mark.parametrize(
    "key", ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "modules_to_save", "peft_type", "bias"]
)
@pytest.mark.parametrize(
    "value", [None, [], {}, "x", 1e308, -1, 10**60, True, [{}], {"(": 1}, {"q_proj": None}], ids=repr
)
def test_whatever_a_config_holds_it_is_read_or_refused_in_one_sentence(model, tmp_path, key, value):
    folder, modules = model
    adapter = write_adapter(tmp_path / "adapter", folder, modules[:1])
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    try:
        opened(folder, adapter).read(f"{modules[0]}.weight")
    except CheckpointError as refused:
        assert "\n" not in str(refused)


def test_values_that_are_not_finite_are_refused(model, tmp_path):
    folder, modules = model
    adapter = write_adapter(tmp_path / "adapter", folder, modules)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[f"{Q}.lora_B.weight"][0, 0] = np.nan
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="holds NaN or infinite values"):
        opened(folder, adapter).read(f"{Q.removeprefix('base_model.model.')}.weight")


def test_a_folder_that_is_no_adapter_is_refused(model, tmp_path):
    folder, _ = model
    with pytest.raises(CheckpointError, match="is no folder: name the folder of a LoRA adapter"):
        Adapter(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        Adapter(folder)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(CheckpointError, match="holds its weights in a pickle"):
        Adapter(tmp_path)


def test_a_head_that_is_the_embedding_is_not_changed_alone(tmp_path):
    folder = write_model(tmp_path / "model", {**GQA, "tie_word_embeddings": True})
    adapter = write_adapter(tmp_path / "adapter", folder, ["model.embed_tokens"])
    with pytest.raises(CheckpointError, match="output head and embedding at once"):
        opened(folder, adapter, tied=True)
