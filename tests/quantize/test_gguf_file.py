"""A checkpoint written as a GGUF file: what it says, holds and gives, and that nothing is left half-done."""

from __future__ import annotations

import json
import math
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf_checks import GQA, V2, YARN, copied_tokenizer, logits, save
from quantize_models import edit_config, stored
from safetensors.torch import save_file

import gguf_models
from latentkv.checkpoint import CheckpointReader
from latentkv.checkpoint.gguf.tensors import GGUFTensors
from latentkv.errors import CheckpointError, OpError
from latentkv.llm_options import EMBEDDED_MODEL
from latentkv.models.config_reader import read_config
from latentkv.quantize.gguf import plan_gguf, write_gguf
from latentkv.quantize.gguf.metadata import config_metadata, require_said
from latentkv.quantize.gguf.mix import choose_type

SHAPES = Path(__file__).parents[2] / "src" / "latentkv" / "plan" / "published"

MODELS: dict[str, dict[str, Any]] = {
    "v3": {},
    "v3-yarn": {"rope_parameters": YARN, "tie_word_embeddings": True},
    "v3-groups": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "q_lora_rank": None},
    "v2-lite": V2 | {"q_lora_rank": None, "rope_parameters": YARN},
    "v2-groups": V2 | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
    "softmax-normed": {"model_type": "mistral4", "rope_parameters": YARN},
    "glm": {"model_type": "glm4_moe_lite", "norm_topk_prob": False},
    "youtu": {"model_type": "youtu", "n_routed_experts": None},
    "llama": GQA | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama3": GQA
    | {
        "model_type": "llama",
        "max_position_embeddings": 16384,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama-linear": GQA | {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    "mistral": GQA | {"model_type": "mistral", "sliding_window": None},
    "qwen2": GQA | {"model_type": "qwen2"},
    "qwen3": GQA | {"model_type": "qwen3"},
}


def write(folder: Path, target: Path, asked: str = "f32", **options: Any) -> Path:
    write_gguf(plan_gguf(folder, asked), target, **options)
    return target


@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_float32_gives_the_checkpoints_logits(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "source", torch.float32, **MODELS[name])
    expected, found = logits(folder), logits(write(folder, tmp_path / "out.gguf"))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def contents(file: Path) -> dict[str, Any]:
    """Metadata and tensors of a file, but for its own name."""
    reader = gguf.GGUFReader(file)
    said = {name: field.contents() for name, field in reader.fields.items() if name != "general.name"}
    tensors = {
        tensor.name: (Type(tensor.tensor_type).name, tensor.shape.tolist(), tensor.data.tobytes())
        for tensor in reader.tensors
    }
    return said | tensors


@pytest.mark.parametrize(
    ("name", "pre"),
    [("v3-groups", None), pytest.param("llama", "gpt-2", marks=pytest.mark.slow), ("qwen2", "none")],
)
def test_from_a_file_comes_what_comes_from_its_folder(name: str, pre: str | None, tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "vocab_size": read_config(EMBEDDED_MODEL).vocab_size}
    folder = copied_tokenizer(EMBEDDED_MODEL, save(tmp_path / "source", **MODELS[name], **shape))
    write_gguf(plan_gguf(folder, "bf16", "qwen2"), tmp_path / "whole.gguf")
    write_gguf(plan_gguf(tmp_path / "whole.gguf", "q4_k", pre), tmp_path / "from_file.gguf")
    write_gguf(plan_gguf(folder, "q4_k", pre or "qwen2"), tmp_path / "from_folder.gguf")
    assert contents(tmp_path / "from_file.gguf") == contents(tmp_path / "from_folder.gguf")


NOT_WRITTEN = (
    *("minicpm3-4b", "deepseek-v3.2", "glm-5.2", "glm-4.5-air", "mixtral-8x7b", "qwen3-30b-a3b", "mistral-small-4"),
    *("a.x-k1", "a.x-k2-light", "kimi-linear-48b", "ling-3.0-flash", "ling-3.0-tiny", "ling-2.6-flash"),
    *("glm-5.3-flash", "longcat-flash"),
)
OTHERS = [
    ({"attention_bias": True}, "attention bias is True, and the file would say False"),
    ({"rope_interleave": False}, "rope interleaved is False"),
    ({"rope_parameters": YARN | {"mscale": 1.0}}, "rope attention_factor is"),
    ({"rope_parameters": {k: v for k, v in YARN.items() if "mscale" not in k}}, "which llama.cpp does not"),
    ({"rope_parameters": YARN | {"truncate": False}}, "the rotary frequencies of its rope type 'yarn'"),
    ({"model_type": "mistral4", "rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}}, "query_scaling_beta is 0.1"),
    ({"model_type": "minicpm3"}, "embedding_multiplier is 12"),
    ({"model_type": "axk1"}, "router post_norm is True"),
    ({"mlp_layer_types": ["sparse", "dense"]}, r"moe_layers is \(True, False\)"),
    (GQA | {"model_type": "mixtral", "n_routed_experts": 4}, "experts of models without latent attention"),
    (
        {"model_type": "deepseek_v32", "index_topk": 8, "index_n_heads": 2, "index_head_dim": 8},
        "layers with sparse attention is 2",
    ),
    ({"num_hidden_layers": 27}, "llama.cpp takes models of 27 layers for such without q_lora_rank"),
    (GQA | {"model_type": "mistral", "sliding_window": 16}, r"sliding_windows is \(16, 16\)"),
]


@pytest.mark.parametrize(("changes", "words"), OTHERS, ids=[words for _, words in OTHERS])
def test_what_gguf_cannot_say_is_refused_by_name(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "source", **changes)
    with pytest.raises(CheckpointError, match=f"cannot be written as GGUF's .* exactly .*{words}.*--weights instead$"):
        write(folder, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_group_size": 2}, "1 layers of Kimi Delta Attention"),
        (
            {"layer_group_size": 2, "architectures": ["BailingMoeV2_5ForCausalLM"], "partial_rotary_factor": 1.0},
            "1 layers of lightning attention",
        ),
        ({"layer_types": ["full_attention"] * 2}, "the gate of its latent attention"),
        ({"model_type": "kimi_linear", "layer_types": ["full_attention"] * 2}, "without rotary embedding"),
        ({"model_type": "longcat_flash", "num_layers": 1, "q_lora_rank": 16}, "experts beside dense blocks"),
        ({"model_type": "hy_v4", "q_lora_rank": 16}, "the gate of its latent attention"),
    ],
)
def test_hybrids_and_parts_of_them_are_refused_by_name(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    hybrid = {"model_type": "bailing_hybrid", "num_hidden_layers": 2, "head_dim": 8}
    folder = save(tmp_path / "source", **(hybrid | changes))
    with pytest.raises(CheckpointError, match=f"cannot be written as GGUF .*{words}.*--weights instead$"):
        write(folder, tmp_path / "out.gguf")


WRITTEN = [path for path in sorted(SHAPES.glob("*.json")) if path.stem not in NOT_WRITTEN]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_published_models_are_said_whole(path: Path) -> None:
    config = read_config(json.loads(path.read_text())["config"])
    vocab = (config.vocab_size, config.hidden_size)
    shapes = {"token_embd.weight": vocab} | ({} if config.tie_word_embeddings else {"output.weight": vocab})
    require_said(config, config_metadata(config), shapes)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not change it. Widths of 256, 192, 96 and 48, as in models whose experts 256 does not divide."""
    return save(
        tmp_path_factory.mktemp("gguf") / "source",
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=192,
        n_routed_experts=2,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=48,
        v_head_dim=64,
        num_nextn_predict_layers=1,
    )


MIX = {
    "q8_0": {"token_embd": "Q8_0", "attn_output": "Q8_0", "attn_k_b": "BF16", "ffn_down_exps": "Q8_0"},
    "q4_0": {"token_embd": "Q6_K", "attn_output": "Q4_0", "attn_v_b": "Q8_0", "ffn_down_exps": "Q4_0"},
    "q4_k": {"token_embd": "Q6_K", "attn_output": "Q4_K", "attn_q_b": "Q5_0", "attn_kv_a_mqa": "Q8_0"},
    "q6_k": {"output": "Q6_K", "attn_output": "Q6_K", "attn_q_b": "Q8_0", "ffn_gate_exps": "Q6_K"},
    "mxfp4": {"token_embd": "Q8_0", "attn_output": "MXFP4", "attn_q_a": "Q8_0", "ffn_up_shexp": "MXFP4"},
    "bf16": {"token_embd": "BF16", "attn_k_b": "BF16"},
    "f16": {"attn_output": "F16"},
}


@pytest.mark.parametrize("asked", MIX)
def test_every_tensor_is_of_the_mix_and_holds_what_the_checkpoint_has(source: Path, tmp_path: Path, asked: str) -> None:
    file = write(source, tmp_path / "out.gguf", asked)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for tensor in theirs.values():
        leaf = tensor.name.split(".")[-2]
        expected = "F32" if len(tensor.shape) == 1 or leaf == "ffn_gate_inp" else MIX[asked].get(leaf)
        assert expected in (None, Type(tensor.tensor_type).name), tensor.name
    before, after = CheckpointReader(source), GGUFTensors(file)
    assert set(after.names) == {name for name in before.names if ".layers.2." not in name}
    for name in after.names:
        exact, found = before.read(name).float(), after.read(name, torch.float32)
        assert (found - exact).norm() <= 0.13 * exact.norm(), name


def test_half_of_the_sensitive_tensors_of_q4_k_get_more_bits(source: Path, tmp_path: Path) -> None:
    file = write(source, tmp_path / "out.gguf", "q4_k")
    kinds = {tensor.name: Type(tensor.tensor_type).name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "Q4_K" and kinds["blk.0.ffn_gate.weight"] == "Q4_K"
    assert kinds["blk.1.ffn_down_exps.weight"] == "Q8_0"  # for Q6_K, of 192 columns
    asked = [choose_type(f"blk.{layer}.ffn_down.weight", (8, 256), "q4_k", torch.bfloat16, 16) for layer in range(16)]
    more = [layer for layer, chosen in enumerate(asked) if chosen.type.name == "Q6_K"]
    assert more == [0, 1, 4, 7, 10, 13, 14, 15]


def test_the_report_tells_what_is_in_the_file(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    plan = plan_gguf(source, "q4_k")
    report = write_gguf(plan, tmp_path / "out.gguf", on_progress=lambda done, total: seen.append((done, total)))
    tensors = gguf.GGUFReader(tmp_path / "out.gguf").tensors
    assert report.total.bytes_after == sum(int(tensor.n_bytes) for tensor in tensors)
    assert report.total.parameters == sum(math.prod(tensor.shape.tolist()) for tensor in tensors)
    before = CheckpointReader(source)
    kept = [name for name in before.names if ".layers.2." not in name]
    assert report.total.bytes_before == sum(before.nbytes(name) for name in kept) == seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    name = "model.layers.0.mlp.gate_proj.weight"
    exact = before.read(name).float()
    row = next(row for row in report.rows if (row.layer, row.kind) == (0, "dense mlp"))
    both = [exact, before.read("model.layers.0.mlp.up_proj.weight").float()]
    both.append(before.read("model.layers.0.mlp.down_proj.weight").float())
    after = GGUFTensors(tmp_path / "out.gguf")
    leaves = ("gate_proj", "up_proj", "down_proj")
    error = sum(
        float((after.read(f"model.layers.0.mlp.{leaf}.weight") - each).square().sum())
        for leaf, each in zip(leaves, both, strict=True)
    )
    assert row.squared_error == pytest.approx(error, rel=1e-4)
    assert any("MTP" in note for note in plan.notes)
    assert "Q5_0 (not Q4_K, at a width of 96)" in {row.format for row in report.rows}


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5])
def test_an_epsilon_of_latents_that_gguf_has_no_key_for_is_said(epsilon: float, tmp_path: Path) -> None:
    source = save(tmp_path / "source", torch.float32, rms_norm_eps=epsilon)
    said = any("normalises latents" in note for note in plan_gguf(source, "f32", "none").notes)
    assert said == (epsilon != 1e-6)


def test_the_file_says_what_it_is(source: Path, tmp_path: Path) -> None:
    metadata = GGUFTensors(write(source, tmp_path / "out.gguf", "q6_k")).metadata
    assert metadata["general.architecture"] == "deepseek2" and metadata["general.name"] == "source"
    assert metadata["general.file_type"] == 18 and metadata["general.quantization_version"] == 2
    assert metadata["deepseek2.attention.key_length_mla"] == 56 and metadata["deepseek2.attention.head_count_kv"] == 1
    assert metadata["tokenizer.ggml.model"] == "no_vocab"


def test_stacked_experts_and_float8_are_written_as_what_they_stand_for(tmp_path: Path) -> None:
    stacked = save(tmp_path / "stacked", torch.float32, model_type="mistral4", rope_parameters=YARN)
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in stored(stacked))
    assert torch.equal(logits(write(stacked, tmp_path / "stacked.gguf")), logits(stacked))
    folder = save(tmp_path / "float8")
    tensors, name = stored(folder), "model.layers.0.self_attn.o_proj.weight"
    tensors[f"{name}_scale_inv"] = torch.full((1, 1), 0.003)
    tensors[name] = (tensors[name].float() / 0.003).to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    found = GGUFTensors(write(folder, tmp_path / "float8.gguf", "f32")).read(name)
    assert torch.equal(found, CheckpointReader(folder).read(name, torch.float32))


def test_calibration_changes_what_is_weighed_and_nothing_else(source: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    importance = torch.ones(256)
    importance[:20] = 50.0
    plain = GGUFTensors(write(source, tmp_path / "plain.gguf", "q4_k"))
    weighed = GGUFTensors(write(source, tmp_path / "weighed.gguf", "q4_k", importance={name: importance}))
    exact = CheckpointReader(source).read(name).float()
    errors = [float(((file.read(name) - exact).square() * importance).sum()) for file in (plain, weighed)]
    assert errors[1] < 0.97 * errors[0]
    others = [other for other in plain.names if other != name]
    assert all(torch.equal(plain.read(other), weighed.read(other)) for other in others)


class Stop(BaseException):
    """What Ctrl-C is like."""


def test_nothing_is_left_of_an_interrupted_or_failed_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, total: int) -> None:
        assert [path.name for path in (tmp_path / "new").iterdir()] == [".out.gguf.partial"]
        if done > total // 2:
            raise Stop

    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    with pytest.raises(Stop):
        write(source, tmp_path / "new" / "out.gguf", "q8_0", on_progress=stop)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    assert not list((tmp_path / "new").iterdir())
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 1000))
    with pytest.raises(CheckpointError, match=r"needs 0.0 GB and its disk has 0.0 GB free: make room"):
        write(source, tmp_path / "new" / "out.gguf", "q8_0")
    assert not list((tmp_path / "new").iterdir())


def test_a_file_that_is_there_is_not_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(CheckpointError, match=r"out\.gguf exists: name a new file"):
        write(source, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        write(source, tmp_path / "file" / "out.gguf")


def test_weights_that_are_no_numbers_or_quantised_already_are_refused(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "damaged"))
    tensors, name = stored(folder), "model.layers.1.mlp.experts.1.up_proj.weight"
    tensors[name][3, 5] = 1e9
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} cannot be written: .* too large for Q4_0"):
        write(folder, tmp_path / "out.gguf", "q4_0")
    assert not (tmp_path / "out.gguf").exists()
    from latentkv.quantize import quantize_checkpoint

    quantize_checkpoint(source, tmp_path / "int8", "int8")
    with pytest.raises(CheckpointError, match="is quantised already"):
        plan_gguf(tmp_path / "int8", "q4_0")
    with pytest.raises(OpError, match="unknown type 'q5_k' for GGUF; choose one of f32"):
        plan_gguf(source, "q5_k")


def test_an_id_that_names_no_token_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_tokenizer = gguf_models._add_tokenizer

    def and_no_padding(writer: gguf.GGUFWriter, *rest: Any) -> None:
        add_tokenizer(writer, *rest)
        writer.add_int32("tokenizer.ggml.padding_token_id", -1)

    monkeypatch.setattr(gguf_models, "_add_tokenizer", and_no_padding)
    file = gguf_models.write_deepseek2(EMBEDDED_MODEL, tmp_path / "whole.gguf")
    write_gguf(plan_gguf(file, "q8_0"), tmp_path / "out.gguf")
    said = GGUFTensors(tmp_path / "out.gguf").metadata
    assert "tokenizer.ggml.padding_token_id" not in said and said["tokenizer.ggml.bos_token_id"] >= 0
