"""`LLM(lora=...)` is the model with the adapter merged, however its weights are kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.numpy import save_file

from adapters import merged, write_adapter
from gguf_models import write_deepseek2
from latentkv import LLM
from latentkv.errors import CheckpointError
from latentkv.llm_options import EMBEDDED_MODEL
from latentkv.models.loading import load_model
from latentkv.models.shard import Shard
from latentkv.models.stage import Stage
from latentkv.quantize import quantize_checkpoint
from stored_models import GQA, GREEDY, MLA, PROMPT, write_model

MODULES = {
    "mla": [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "kv_b_proj", "o_proj")],
    "gqa": [f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qkvo"],
}


@pytest.fixture(scope="module", params=["mla", "gqa"])
def folders(request, tmp_path_factory):
    """(a model, an adapter of it, both merged)."""
    parent = tmp_path_factory.mktemp(request.param)
    model = write_model(parent / "model", MLA if request.param == "mla" else GQA)
    adapter = write_adapter(parent / "adapter", model, MODULES[request.param])
    whole = Path(shutil.copytree(model, parent / "whole"))
    save_file(merged(model, adapter), whole / "model.safetensors", metadata={"format": "pt"})
    return model, adapter, whole


def answer(*args, **options):
    llm = LLM(*args, kv_cache_bytes=1 << 20, **options)
    return llm.generate(PROMPT, GREEDY)[0].token_ids


@pytest.mark.parametrize("options", [{}, {"weights": "int8"}, {"dtype": "bf16"}], ids=str)
def test_the_answers_are_those_of_the_merged_model(folders, options):
    model, adapter, whole = folders
    found, expected = (LLM(*args, kv_cache_bytes=1 << 20, **options) for args in ((model,), (whole,)))
    with_adapter = LLM(model, lora=adapter, kv_cache_bytes=1 << 20, **options)
    ids = PROMPT[:40]
    torch.testing.assert_close(with_adapter.logits(ids), expected.logits(ids), rtol=1e-3, atol=1e-2)
    assert not torch.allclose(with_adapter.logits(ids), found.logits(ids), rtol=1e-1, atol=1e-1)


@pytest.mark.parametrize("index", [0, 1])
def test_a_shard_has_its_part_of_what_is_merged_rounded_once(folders, index):
    model, adapter, whole = folders
    stage = Stage.whole(2).sharded(Shard(index, 2))
    found, expected = (
        load_model(folder, lora=lora, stage=stage, dtype=torch.float32).state_dict()
        for folder, lora in ((model, adapter), (whole, None))
    )
    rounded = load_model(model, lora=adapter, stage=stage, dtype=torch.bfloat16).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(rounded[name], tensor.to(rounded[name].dtype))


def test_packed_weights_that_are_kept_are_those_of_the_model_and_the_adapter(folders, tmp_path):
    model, adapter, whole = folders
    other = write_adapter(tmp_path / "other", model, MODULES["gqa"][:1], seed=5)
    packed, options = tmp_path / "packed", {"weights": "int8"}
    alike = [(whole, None), (model, adapter)]
    expected = [answer(folder, lora=lora, packed_dir=None, **options) for folder, lora in alike]
    plain, tuned = (answer(model, lora=lora, packed_dir=None, **options) for lora in (None, other))
    for _ in range(2):  # the second time from the files
        assert answer(model, packed_dir=packed, **options) == plain
        assert answer(model, lora=other, packed_dir=packed, **options) == tuned
        assert answer(model, lora=adapter, packed_dir=packed, **options) == expected[1]
    kept = [file for file in packed.iterdir() if file.stat().st_size > 1000]
    assert len(kept) == 3
    (adapter / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text().replace(": 5,", ": 50,"))
    assert answer(model, lora=adapter, packed_dir=packed, **options) == answer(
        model, lora=adapter, packed_dir=None, **options
    )
    assert len([file for file in packed.iterdir() if file.stat().st_size > 1000]) == 4
    (adapter / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text().replace(": 50,", ": 5,"))


def test_prompts_that_are_kept_in_files_are_of_the_model_and_the_adapter(folders, tmp_path):
    model, adapter, _ = folders
    for lora in (None, adapter, None, adapter):
        llm = LLM(model, lora=lora, kv_cache_bytes=1 << 20, cache_dir=tmp_path / "pages")
        expected = answer(model, lora=lora)
        assert llm.generate(PROMPT, GREEDY)[0].token_ids == expected
        llm.close()


def test_weights_that_are_stored_quantised_are_refused(folders, tmp_path):
    model, adapter, _ = folders
    quantize_checkpoint(model, tmp_path / "int8", "int8")
    with pytest.raises(CheckpointError, match=r"is stored as int8.* name the original release, which --weights int4"):
        LLM(tmp_path / "int8", lora=adapter)


def test_a_gguf_file_is_refused(folders, tmp_path):
    file = write_deepseek2(Path(str(EMBEDDED_MODEL)), tmp_path / "small.gguf")
    with pytest.raises(CheckpointError, match=r"GGUF file, into which .* is not merged: name the model's original"):
        LLM(file, lora=folders[1])
