"""A folder that cannot be read is named for what it is, with a remedy."""

import json

import pytest
import torch
from safetensors.torch import save_file

from latentkv.checkpoint import CheckpointReader, match_parameters
from latentkv.checkpoint.layouts import foreign_quantization
from latentkv.errors import CheckpointError, ConfigError
from latentkv.models.config_reader import read_config

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def touch(*names):
    return lambda folder: [(folder / name).write_text("{}") for name in names]


def pointer(name):
    return lambda folder: (folder / name).write_text(POINTER)


def dead_link(name):
    return lambda folder: (folder / name).symlink_to("../../blobs/gone")


def shards(present, total):
    def make(folder):
        for i in range(present):
            save_file({f"t{i}": torch.ones(1)}, folder / f"model-{i + 1:05d}-of-{total:05d}.safetensors")

    return make


def index(*, lacking):
    def make(folder):
        save_file({"t0": torch.ones(1)}, folder / "a.safetensors")
        weight_map = {"t0": "a.safetensors"} | {f"x{i}": f"gone-{i}.safetensors" for i in range(lacking)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return make


def adapter(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    save_file({"lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")


def nothing(folder):
    pass


FOLDERS = {
    "empty": (nothing, "empty folder"),
    "GGUF": (
        touch("model-Q4_K_M.gguf"),
        r"has no safetensors, but a model in GGUF: name the file itself, .*model-Q4_K_M\.gguf",
    ),
    "LoRA": (adapter, "LoRA adapter of org/base.*merge it"),
    "pickled": (touch("pytorch_model.bin"), r"pytorch_model\.bin.*convert to safetensors"),
    "pickled shards": (touch("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"), "pickled"),
    "Lightning": (touch("last.ckpt"), r"last\.ckpt.*convert to safetensors"),
    "TensorFlow": (touch("tf_model.h5"), r"only tf_model\.h5.*release in safetensors"),
    "ONNX": (touch("model.onnx"), r"only model\.onnx"),
    "diffusers": (touch("model_index.json"), "diffusers pipeline"),
    "sentence-transformers": (touch("modules.json"), "sentence-transformers"),
    "dead link": (dead_link("model.safetensors"), r"model\.safetensors is a link to .*gone, which is not there.*cp -L"),
    "dead link of the index": (dead_link("model.safetensors.index.json"), "is a link to"),
    "pointer": (pointer("model.safetensors"), r"git-LFS pointer.*git lfs pull"),
    "pointer of the index": (pointer("model.safetensors.index.json"), "git-LFS pointer"),
    "a shard is missing": (index(lacking=1), r"lacks the shard gone-0\.safetensors .*for x0\): download it"),
    "shards are missing": (index(lacking=3), r"lacks the shard gone-0\.safetensors .*and 2 more: download them"),
    "shards without index": (shards(1, 3), r"1 of 3 shards .*add the index, download the 2 that are missing"),
    "one file of another name": (lambda f: save_file({"a": torch.ones(1)}, f / "x.safetensors"), "rename it"),
    "Mistral's own": (touch("consolidated.safetensors", "params.json"), "developer's own code"),
    "a training run": (
        lambda f: [(f / "checkpoint-9").mkdir(), touch("config.json")(f / "checkpoint-9")],
        "checkpoint-9 does",
    ),
    "something else": (touch("NOTES.txt", "README.md"), r"only NOTES\.txt, README\.md"),
}


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("kind", FOLDERS)
def test_the_sentence_names_what_the_folder_holds(tmp_path, kind, with_config):
    make, named = FOLDERS[kind]
    make(tmp_path)
    if with_config:
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        if kind in ("empty", "a training run"):
            named = "has no weights, only"
    with pytest.raises(CheckpointError, match=named):
        CheckpointReader(tmp_path)
    has_some = any((tmp_path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    if not with_config and not has_some:
        with pytest.raises(ConfigError, match=rf"has no config\.json: .*{named}"):
            read_config(tmp_path)


def test_folders_that_are_not_there_are_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        CheckpointReader(tmp_path / "none")
    (tmp_path / "link").symlink_to(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"link is a link to .*none, which is not there"):
        CheckpointReader(tmp_path / "link")


@pytest.mark.parametrize("make", [pointer, dead_link])
def test_a_config_that_is_only_named_says_so(tmp_path, make):
    make("config.json")(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json is a (git-LFS pointer|link to)"):
        read_config(tmp_path)


METHODS = {
    "GPTQ by its keys": {"bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "AWQ by its keys": {"w_bit": 4, "q_group_size": 128, "zero_point": True},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes by its keys": {"load_in_8bit": True, "llm_int8_threshold": 6.0},
    "MLX by its keys": {"group_size": 64, "bits": 4, "mode": "affine"},
    "ModelOpt (W4A8_AWQ)": {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
    "ModelOpt (INT4_AWQ) by its keys": {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "INT4_AWQ"}},
    "HQQ": {"quant_method": "hqq"},
    "EXL2": {"quant_method": "exl2", "bits": 4.0},
    "torchao": {"quant_method": "torchao", "quant_type": "int4_weight_only"},
    "'quanto'": {"quant_method": "quanto", "weights": "int8"},
    "MXFP4": {"quant_method": "mxfp4"},
    "'somebody-new'": {"quant_method": "somebody-new"},
    "a method that is not named": {"foo": 1},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("nested", [False, True])
def test_a_method_of_quantisation_is_refused_by_its_name(tmp_path, method, nested):
    named = method.removesuffix(" by its keys")
    assert named in foreign_quantization(METHODS[method])
    config = {"model_type": "llama", "quantization_config": METHODS[method]}
    config = {"model_type": "wrapper", "text_config": config} if nested else config
    with pytest.raises(ConfigError) as caught:
        read_config(config)
    assert named in str(caught.value)
    assert "latentkv quantize" in str(caught.value)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as refused:
        CheckpointReader(tmp_path)
    assert named in str(refused.value)


def test_mlx_notes_its_method_under_a_key_of_its_own():
    with pytest.raises(ConfigError, match="by MLX"):
        read_config({"model_type": "llama", "quantization": {"group_size": 64, "bits": 4}})


LAYOUTS = {
    "bitsandbytes": ["a.weight", "a.weight.absmax", "a.weight.quant_state.bitsandbytes__nf4"],
    "GPTQ or AWQ": ["a.qweight", "a.qzeros", "a.scales"],
    "NVFP4": ["a.weight", "a.weight_scale", "a.weight_scale_2"],
    "HQQ": ["a.W_q", "a.meta"],
    "EXL2": ["a.q_weight", "a.q_invperm"],
    "quanto": ["a.weight._data", "a.weight._scale"],
    "MXFP4": ["experts.gate_up_proj_blocks", "experts.gate_up_proj_scales"],
    "MLX": ["a.weight", "a.scales", "a.biases"],
    "MLX's layout of experts": ["model.layers.1.mlp.switch_mlp.up_proj.weight"],
    "a LoRA adapter": ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"],
    "GGUF's names": ["blk.0.attn_q.weight", "token_embd.weight"],
    "developer's own code": ["tok_embeddings.weight", "layers.0.attention.wq.weight"],
    "weight_scale_inv": ["a.weight", "a.weight_scale"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_that_do_not_fit_give_their_layout_away(tmp_path, layout):
    save_file({name: torch.ones(1) for name in LAYOUTS[layout]}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=layout):
        match_parameters({"model.a.weight": torch.ones(1)}, CheckpointReader(tmp_path), num_layers=1)


@pytest.mark.parametrize(
    ("file", "content", "method"),
    [
        ("quanto_qmap.json", "{}", r"quanto \("),
        ("hf_quant_config.json", '{"quantization": {"quant_algo": "NVFP4"}}', r"ModelOpt \(NVFP4\)"),
    ],
)
def test_a_file_of_the_tool_that_quantised_names_the_method(tmp_path, file, content, method):
    save_file({"a.qweight": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError, match=f"quantised by {method}"):
        match_parameters({"model.a.weight": torch.ones(1)}, CheckpointReader(tmp_path), num_layers=1)
