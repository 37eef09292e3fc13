"""Packed weights: the layout is that of the compressed-tensors library, and only what can be held is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from latentkv.checkpoint import CheckpointReader
from latentkv.errors import CheckpointError
from latentkv.weights.files.compressed_config import PackedSchemes, build_config
from latentkv.weights.files.compressed_tensors import pack, packed_layout, unpack
from latentkv.weights.formats import INT4, INT8, UINT4
from latentkv.weights.policy import WeightScheme, choose_scheme
from latentkv.weights.weight import QuantizedWeight, quantize_weight

SCHEMES = [WeightScheme(INT8, None), WeightScheme(INT8, 64), WeightScheme(INT4, 32), WeightScheme(INT4, 128)]
NAME = "model.layers.0.mlp.up_proj"


def a_weight(rows: int = 24, columns: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def saved(
    folder: Path, weights: dict[str, QuantizedWeight], schemes: dict[str, WeightScheme], **others: torch.Tensor
) -> Path:
    parts = {f"{module}.weight{part}": t for module, weight in weights.items() for part, t in pack(weight).items()}
    save_file(parts | others, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": build_config(schemes, ["lm_head"])}))
    return folder


def edited(folder: Path, change: Any) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    return folder


def one_saved(folder: Path, scheme: WeightScheme = SCHEMES[3]) -> Path:
    return saved(folder, {NAME: quantize_weight(a_weight(), scheme.format, scheme.group)}, {NAME: scheme})


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("columns", [256, 1, 7, 100])
def test_what_is_packed_comes_back_and_has_the_announced_layout(scheme, columns):
    weight = quantize_weight(a_weight(5, columns), scheme.format, scheme.group)
    parts = pack(weight)
    assert {part: (t.dtype, tuple(t.shape)) for part, t in parts.items()} == packed_layout((5, columns), scheme)
    back = unpack("w", parts, scheme)
    assert torch.equal(back.codes, weight.codes) and torch.equal(back.scales, weight.scales)
    assert (back.format, back.group) == (weight.format, weight.group)


def test_every_code_of_either_width_survives():
    for bits, scheme in ((4, SCHEMES[2]), (8, SCHEMES[0])):
        codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8).repeat(3, 2)
        groups = -(-codes.shape[1] // (scheme.group or codes.shape[1]))
        weight = QuantizedWeight(codes, torch.ones(3, groups).bfloat16(), scheme.format, scheme.group or codes.shape[1])
        assert torch.equal(unpack("w", pack(weight), scheme).codes, codes)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_compressed_tensors_library_reads_the_same_weight_bit_for_bit(tmp_path, scheme):
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationConfig

    weight = quantize_weight(a_weight(), scheme.format, scheme.group)
    config = QuantizationConfig.model_validate(build_config({NAME: scheme}, ["lm_head"]))
    theirs = compressors.BaseCompressor.get_value_from_registry(config.format)
    parts = {f"weight{part}": tensor for part, tensor in pack(weight).items()}
    read = theirs.decompress(parts, config.config_groups["group_0"])["weight"]
    assert torch.equal(read, weight.dequantize(torch.bfloat16))
    reader = CheckpointReader(saved(tmp_path, {NAME: weight}, {NAME: scheme}))
    assert torch.equal(reader.read(f"{NAME}.weight", dtype=torch.bfloat16), read)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_the_compressed_tensors_library_writes_is_read(tmp_path, scheme):
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(build_config({NAME: scheme}, []))
    theirs = compressors.BaseCompressor.get_value_from_registry(config.format)
    weight = a_weight().bfloat16()
    groups = weight.unflatten(1, (-1, scheme.group or 256))
    scale = (groups.abs().amax(-1) / (7.5 if scheme.format.bits == 4 else 127.5)).bfloat16()
    parts = theirs.compress({"weight": weight, "weight_scale": scale}, config.config_groups["group_0"])
    save_file({f"{NAME}.{part}": tensor for part, tensor in parts.items()}, tmp_path / "model.safetensors")
    dumped = {"quantization_config": config.model_dump(mode="json") | {"version": "0.20.0", "sparsity_config": {}}}
    (tmp_path / "config.json").write_text(json.dumps(dumped))
    expected = theirs.decompress(parts, config.config_groups["group_0"])["weight"]
    assert torch.equal(CheckpointReader(tmp_path).read(f"{NAME}.weight", dtype=torch.bfloat16), expected)


@pytest.mark.parametrize("scheme", [WeightScheme(INT4, 32), WeightScheme(INT4, 128)])
def test_what_the_compressed_tensors_library_writes_with_zero_points_is_read(tmp_path, scheme):
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationConfig

    built = build_config({NAME: scheme}, [])
    built["config_groups"]["group_0"]["weights"]["symmetric"] = False
    config = QuantizationConfig.model_validate(built)
    theirs = compressors.BaseCompressor.get_value_from_registry(config.format)
    weight = a_weight().half() + 0.5
    low, high = weight.unflatten(1, (-1, scheme.group or 256)).aminmax(dim=-1)
    scale = ((high - low) / 15).half()
    zero = (-8 - low / scale).round().clamp(-8, 7).to(torch.int8)
    parts = theirs.compress(
        {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}, config.config_groups["group_0"]
    )
    save_file({f"{NAME}.{part}": tensor.contiguous() for part, tensor in parts.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config.model_dump(mode="json")}))
    reader = CheckpointReader(tmp_path)
    assert reader.names == (f"{NAME}.weight",)
    found = reader.quantized(f"{NAME}.weight")
    assert found is not None and (found.format, found.group) == (UINT4, scheme.group) and found.minima is not None
    expected = theirs.decompress(parts, config.config_groups["group_0"])["weight"]
    torch.testing.assert_close(found.dequantize().half(), expected, atol=2e-3, rtol=2e-3)
    assert torch.equal(found.dequantize().half().sign(), expected.sign())


def test_zero_points_that_a_config_promises_and_files_lack_are_missed(tmp_path):
    folder = edited(one_saved(tmp_path), weights_change(symmetric=False))
    with pytest.raises(CheckpointError, match=r"says that .*weight has zero points, and .* has no .*_zero_point"):
        CheckpointReader(folder)


def test_zero_points_that_do_not_fit_are_named(tmp_path):
    parts = {f"{NAME}.weight{part}": t for part, t in pack(quantize_weight(a_weight(), "int4")).items()}
    save_file(parts | {f"{NAME}.weight_zero_point": torch.zeros(1)}, tmp_path / "model.safetensors")
    built = build_config({NAME: WeightScheme(INT4, 128)}, [])
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": built}))
    with pytest.raises(CheckpointError, match=r"weight_zero_point is torch.float32 \[1\] and should be int32 \[3, 2\]"):
        CheckpointReader(tmp_path).read(f"{NAME}.weight")


@pytest.mark.parametrize(("times", "kept"), [(1 + 2**-9, torch.float16), (1.001, torch.float32)])
def test_scales_that_bfloat16_has_not_all_bits_of_are_kept_in_a_wider_type(tmp_path, times, kept):
    def change(scale):
        scaled = torch.full_like(scale, 0.25).float() * times
        return scaled.to(kept)

    reader = with_parts(tmp_path, replaced("scale", change))
    weight = reader.quantized(f"{NAME}.weight")
    assert weight is not None and weight.scales.dtype == kept
    assert torch.equal(weight.dequantize(), weight.codes * torch.tensor(0.25 * times).to(kept).float())


def test_the_reader_lists_a_packed_weight_once_and_gives_it_either_way(tmp_path):
    scheme = WeightScheme(INT4, 128)
    weight = quantize_weight(a_weight(), "int4")
    reader = CheckpointReader(saved(tmp_path, {NAME: weight}, {NAME: scheme}, **{"model.norm.weight": torch.ones(4)}))
    assert reader.names == (f"{NAME}.weight", "model.norm.weight")
    assert f"{NAME}.weight" in reader and f"{NAME}.weight_scale" not in reader
    assert reader.shape(f"{NAME}.weight") == (24, 256)
    assert reader.dtype(f"{NAME}.weight").is_floating_point
    assert reader.nbytes(f"{NAME}.weight") == weight.nbytes + 16
    assert reader.nbytes("model.norm.weight") == 16
    assert reader.scheme(f"{NAME}.weight") == scheme and reader.scheme("model.norm.weight") is None
    assert torch.equal(reader.quantized(f"{NAME}.weight").codes, weight.codes)
    assert reader.quantized("model.norm.weight") is None
    assert torch.equal(reader.read(f"{NAME}.weight"), weight.dequantize())
    assert reader.read(f"{NAME}.weight", dtype=torch.float16).dtype == torch.float16
    for ask in (reader.quantized, reader.scheme, reader.nbytes, reader.read):
        with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.0\.mlp\.up_proj\.weight_packed"):
            ask(f"{NAME}.weight_packed")


def test_int4_scales_of_whole_rows_are_repeated_for_groups(tmp_path):
    codes = torch.randint(-8, 8, (3, 200), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    channel = QuantizedWeight(codes, torch.tensor([[0.5], [-2.0], [3.0]]).bfloat16(), INT4, 200)
    reader = CheckpointReader(saved(tmp_path, {NAME: channel}, {NAME: WeightScheme(INT4, None)}))
    read = reader.quantized(f"{NAME}.weight")
    assert read.group == 128 and read.scales.shape == (3, 2)
    assert torch.equal(read.dequantize(), channel.dequantize())


def test_mixed_schemes_survive_their_config():
    schemes = {f"model.layers.{i}.mlp.up_proj": SCHEMES[3] for i in range(9)}
    schemes |= {"lm_head": SCHEMES[0], "model.layers.0.mlp.down_proj": SCHEMES[2]}
    config = build_config(schemes, ["model.layers.0.mlp.gate"])
    assert config["ignore"] == ["model.layers.0.mlp.gate"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    read = PackedSchemes(json.loads(json.dumps(config)), [*schemes, "model.layers.0.mlp.gate_proj"])
    assert {name: read.of(name) for name in schemes} == schemes
    assert read.asked == SCHEMES[3]
    assert read.ignores("model.layers.0.mlp.gate") and not read.ignores("model.layers.0.mlp.gate_proj")


def test_a_named_target_comes_before_a_pattern_and_that_before_every_linear():
    config = build_config({"a": SCHEMES[0], "b": SCHEMES[1], "c": SCHEMES[2]}, [])
    for group, target in zip(config["config_groups"].values(), ("Linear", r"re:.*mlp\..*", "x.mlp.up"), strict=True):
        group["targets"] = [target]
    modules = ["x.attn.o", "x.mlp.down", "x.mlp.up"]
    read = PackedSchemes(config, modules)
    assert [read.of(name) for name in modules] == SCHEMES[:3]
    del config["config_groups"]["group_0"]
    with pytest.raises(CheckpointError, match=r"x\.attn\.o is stored packed, but no target"):
        PackedSchemes(config, modules).of("x.attn.o")


def group_change(**changes: Any) -> Any:
    return lambda config: config["config_groups"]["group_0"].update(changes)


def weights_change(**changes: Any) -> Any:
    return lambda config: config["config_groups"]["group_0"]["weights"].update(changes)


UNSUPPORTED = [
    (lambda c: c.update(config_groups={}), "no config_groups"),
    (lambda c: c.update(config_groups={"W4A16": ["Linear"]}), "W4A16 is"),
    (lambda c: c.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
    (lambda c: c.update(transform_config={"config_groups": {}}), "transform_config"),
    (lambda c: c.update(quantization_status="frozen"), "quantization_status is 'frozen'"),
    (group_change(format="marlin-24"), "'marlin-24'"),
    (group_change(format="int-quantized"), "4 bits .*: of int-quantized only 8"),
    (group_change(format="nvfp4-pack-quantized"), "of nvfp4-pack-quantized only 4 \\(float\\)"),
    (group_change(weights=None), "nothing about weights"),
    (group_change(targets=["re:("]), "regular expression"),
    (group_change(targets=[]), "name no targets"),
    (lambda c: c.update(ignore=["re:*"]), "regular expression"),
    (weights_change(type="float"), "4 bits \\('float'\\)"),
    (weights_change(actorder="group"), "actorder is 'group'"),
    (weights_change(num_bits=3), "3 bits"),
    (weights_change(num_bits=[4]), r"\[4\] bits"),
    (weights_change(group_size=256), "groups of 256"),
    (weights_change(group_size=None), "groups of None"),
    (weights_change(strategy="tensor", group_size=None), "strategy 'tensor'"),
    (weights_change(strategy="block", block_structure=[128, 128]), "strategy 'block'"),
]


@pytest.mark.parametrize(("change", "words"), UNSUPPORTED, ids=[words for _, words in UNSUPPORTED])
def test_a_scheme_that_cannot_be_held_is_refused_in_one_sentence(tmp_path, change, words):
    with pytest.raises(CheckpointError, match=words) as raised:
        CheckpointReader(edited(one_saved(tmp_path), change))
    assert "\n" not in str(raised.value)


def with_parts(folder: Path, change: Any) -> CheckpointReader:
    parts = {f"{NAME}.weight{part}": tensor for part, tensor in pack(quantize_weight(a_weight(), "int4")).items()}
    one_saved(folder)
    save_file(change(parts), folder / "model.safetensors")
    return CheckpointReader(folder)


def replaced(part: str, change: Any) -> Any:
    return lambda parts: parts | {f"{NAME}.weight_{part}": change(parts[f"{NAME}.weight_{part}"])}


BROKEN = [
    (replaced("scale", lambda t: torch.full_like(t, float("nan"))), "weight_scale holds NaN"),
    (replaced("scale", lambda t: t.short()), "no floating point"),
    (replaced("scale", lambda t: t[:, :1].clone()), r"weight_scale has shape \[24, 1\] and should have \[24, 2\]"),
    (replaced("packed", lambda t: t[:, :9].clone()), r"weight_packed has shape \[24, 9\]"),
    (replaced("packed", lambda t: t.long()), "torch.int64: it must be int32"),
    (replaced("shape", lambda t: torch.tensor([24])), "only matrices"),
    (replaced("shape", lambda t: torch.tensor([24, -1])), "only matrices"),
    (replaced("shape", lambda t: torch.tensor([24, 300])), r"weight_packed has shape \[24, 32\]"),
]


@pytest.mark.parametrize(("change", "words"), BROKEN, ids=[words for _, words in BROKEN])
def test_parts_that_do_not_fit_together_are_named(tmp_path, change, words):
    with pytest.raises(CheckpointError, match=words):
        with_parts(tmp_path, change).read(f"{NAME}.weight")


INCOMPLETE = [
    (lambda parts: {n: t for n, t in parts.items() if not n.endswith("scale")}, "has no .*weight_scale beside it"),
    (lambda parts: {n: t for n, t in parts.items() if not n.endswith("shape")}, "has no .*weight_shape beside it"),
    (lambda parts: parts | {f"{NAME}.weight_g_idx": torch.zeros(1)}, "weight_g_idx says"),
    (lambda parts: parts | {f"{NAME}.weight": torch.zeros(1)}, "stored twice"),
]


@pytest.mark.parametrize(("change", "words"), INCOMPLETE, ids=[words for _, words in INCOMPLETE])
def test_missing_and_foreign_parts_are_refused_when_opened(tmp_path, change, words):
    with pytest.raises(CheckpointError, match=words):
        with_parts(tmp_path, change)


def test_float32_and_float16_scales_that_bfloat16_holds_are_read(tmp_path):
    expected = quantize_weight(a_weight(), "int4").dequantize()
    reader = with_parts(tmp_path, replaced("scale", lambda t: t.float()))
    assert torch.equal(reader.read(f"{NAME}.weight"), expected)


HIGH = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.q_a_proj.weight",
    "model.layers.0.self_attn.q_a_layernorm.weight",
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
    "model.layers.0.self_attn.kv_b_proj.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.self_attn.b_proj.weight",
    "model.layers.0.self_attn.f_a_proj.weight",
    "model.layers.0.self_attn.g_b_proj.weight",
    "model.layers.0.self_attn.g_proj.weight",  # of so few rows it is latent attention's, a number a head
    "model.layers.0.self_attn.q_conv1d.weight",
    "model.layers.0.self_attn.A_log",
    "model.layers.0.self_attn.dt_bias",
    "model.layers.0.self_attn.indexer.weights_proj.weight",
    "model.layers.0.self_attn.indexer.index_kpool_compress_gate",
    "model.layers.0.self_attn.indexer.index_kpool_compress_ape",
    "model.layers.0.hc_attn_fn",
    "model.layers.0.hc_ffn_base",
    "model.layers.3.mlp.gate.weight",
    "model.layers.3.mlp.gate.e_score_correction_bias",
    "model.layers.61.eh_proj.weight",
    "model.layers.61.embed_tokens.weight",
    "vision_tower.layers.0.self_attn.q_proj.weight",
]
LOW = [
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.q_b_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.self_attn.v_proj.weight",
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.0.self_attn.f_proj.weight",
    "model.layers.0.self_attn.indexer.wq_b.weight",
    "model.layers.0.self_attn.indexer.wk.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.3.mlp.shared_experts.gate_proj.weight",
    "model.layers.3.mlp.experts.17.up_proj.weight",
    "model.layers.3.mlp.experts.gate_up_proj",
    "model.layers.3.mlp.experts.down_proj",
]


def test_routers_norms_embeddings_and_latent_projections_stay_and_the_rest_is_quantised():
    for name in HIGH:
        assert choose_scheme(name, (256, 256), INT4) is None, name
    for name in LOW:
        assert choose_scheme(name, (256, 256), INT4) == WeightScheme(INT4, 128), name
        assert choose_scheme(name, (256, 256), INT4, 32) == WeightScheme(INT4, 32), name
        assert choose_scheme(name, (256, 256), INT8) == WeightScheme(INT8, None), name


def test_the_output_gate_of_a_recurrent_layer_is_quantised_as_its_other_projections_are():
    assert choose_scheme("model.layers.0.self_attn.g_proj.weight", (2048, 256), INT4) == WeightScheme(INT4, 128)


def test_the_output_head_never_gets_less_than_int8():
    for name in ("lm_head.weight", "model.layers.61.shared_head.head.weight"):
        assert choose_scheme(name, (512, 256), INT4, 32) == WeightScheme(INT8, None)
        assert choose_scheme(name, (512, 256), INT8, 64) == WeightScheme(INT8, 64)


def test_a_width_that_the_group_does_not_divide_gets_a_smaller_one_or_int8_rows():
    name = "model.layers.0.mlp.down_proj.weight"
    assert choose_scheme(name, (256, 10944), INT4) == WeightScheme(INT4, 64)
    assert choose_scheme(name, (256, 96), INT8, 128) == WeightScheme(INT8, 32)
    assert choose_scheme(name, (256, 100), INT4) == WeightScheme(INT8, None)
