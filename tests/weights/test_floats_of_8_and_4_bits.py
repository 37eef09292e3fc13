"""Float8, MXFP8, MXFP4, NVFP4 and W8A8 as compressed-tensors and ModelOpt store them: read as the library says, and
kept at their width."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from latentkv.bench.models.step_work import weight_format
from latentkv.checkpoint import CheckpointReader
from latentkv.errors import CheckpointError
from latentkv.models.config_reader import read_config
from latentkv.models.loading import load_model
from latentkv.models.packing import Packing
from latentkv.models.parameters import checkpoint_dtype, weight_bytes
from latentkv.plan import stored_weights
from latentkv.weights.formats import FP4, FP8, INT8, CodeFormat
from latentkv.weights.layout import pack_weight, unpack_weight
from stored_models import MLA, write_model

NAME = "model.layers.0.mlp.up_proj"
_WRITTEN = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

compressors = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")


def a_weight(rows: int = 40, columns: int = 256, seed: int = 0) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return (weight * 0.05).bfloat16()


def saved(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None) -> CheckpointReader:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if quantization is not None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return CheckpointReader(folder)


LAYOUTS: dict[str, tuple[str, dict[str, Any], CodeFormat, int]] = {
    "float8 by channels": ("float-quantized", {"type": "float", "num_bits": 8, "strategy": "channel"}, FP8, 256),
    "float8 by tensor": ("float-quantized", {"type": "float", "num_bits": 8, "strategy": "tensor"}, FP8, 256),
    "float8 by blocks": (
        "float-quantized",
        {"type": "float", "num_bits": 8, "strategy": "block", "block_structure": [32, 128]},
        FP8,
        128,
    ),
    "float8, naive": ("naive-quantized", {"type": "float", "num_bits": 8, "strategy": "channel"}, FP8, 256),
    "int8 by channels": ("int-quantized", {"type": "int", "num_bits": 8, "strategy": "channel"}, INT8, 256),
    "int8 by groups": (
        "int-quantized",
        {"type": "int", "num_bits": 8, "strategy": "group", "group_size": 64},
        INT8,
        64,
    ),
    "MXFP8": (
        "mxfp8-quantized",
        {"type": "float", "num_bits": 8, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
        FP8,
        32,
    ),
    "MXFP4": (
        "mxfp4-pack-quantized",
        {"type": "float", "num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
        FP4,
        32,
    ),
    "NVFP4": (
        "nvfp4-pack-quantized",
        {"type": "float", "num_bits": 4, "strategy": "tensor_group", "group_size": 16},
        FP4,
        16,
    ),
}


def scales_of(weight: Tensor, weights: dict[str, Any]) -> Tensor:
    """Scales by which every weight is within the range of its codes."""
    top = {("float", 8): 448.0, ("int", 8): 127.0, ("float", 4): 6.0}[weights["type"], weights["num_bits"]]
    strategy, size = weights["strategy"], weights.get("group_size")
    if strategy == "tensor":
        return weight.abs().amax().reshape(1) / top
    if strategy == "channel":
        return weight.abs().amax(-1, keepdim=True) / top
    if strategy == "block":
        rows, columns = weights["block_structure"]
        padded = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % rows))
        return padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).abs().amax((1, 3)) / top
    scale = weight.unflatten(1, (-1, size)).abs().amax(-1) / top
    return 2.0 ** torch.log2(scale.float()).ceil() if "scale_dtype" in weights else scale


def by_library(layout: str, weights: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    """What the library stores of a weight, the weight that it reads from that, and its config."""
    from compressed_tensors.quantization import QuantizationConfig

    asked = weights | {"symmetric": True, "dynamic": False}
    activations = {"num_bits": weights["num_bits"], "type": weights["type"], "dynamic": True, "strategy": "token"}
    group = {"targets": ["Linear"], "weights": asked, "input_activations": activations, "format": layout}
    config = QuantizationConfig.model_validate({"config_groups": {"group_0": group}, "format": layout, "ignore": []})
    theirs = compressors.BaseCompressor.get_value_from_registry(layout)
    weight, scheme = a_weight(), config.config_groups["group_0"]
    state = {"weight": weight, "weight_scale": scales_of(weight, weights).bfloat16()}
    if weights["strategy"] == "tensor_group":
        whole = torch.tensor([448.0 * 6]) / weight.abs().amax().float()
        state = {"weight": weight, "weight_global_scale": whole}
        state["weight_scale"] = (scales_of(weight, weights).float() * whole).to(torch.float8_e4m3fn).bfloat16()
    parts = theirs.compress(state, scheme)
    return parts, theirs.decompress(dict(parts), scheme)["weight"], config.model_dump(mode="json") | _WRITTEN


@pytest.mark.parametrize("kind", LAYOUTS)
def test_what_the_compressed_tensors_library_stores_is_read_and_kept_at_its_width(tmp_path: Path, kind: str) -> None:
    layout, weights, form, group = LAYOUTS[kind]
    parts, expected, config = by_library(layout, weights)
    reader = saved(tmp_path, {f"{NAME}.{part}": tensor for part, tensor in parts.items()}, config)
    assert reader.names == (f"{NAME}.weight",) and reader.shape(f"{NAME}.weight") == (40, 256)
    found = reader.quantized(f"{NAME}.weight")
    assert found is not None and (found.format, found.group) == (form, group)
    # The library rounds to bfloat16 as it multiplies, and NVFP4's scale before that.
    torch.testing.assert_close(found.dequantize(), expected.float(), rtol=2**-6 if kind == "NVFP4" else 2**-8, atol=0)
    packed = pack_weight(found)
    assert packed.format == form.name and torch.equal(unpack_weight(packed), found.dequantize())
    assert torch.equal(reader.read(f"{NAME}.weight"), found.dequantize())
    assert reader.notes == (
        f"its config quantises activations, too ({weights['type']} of {weights['num_bits']} bits): here they are "
        "computed as they are",
    )


def modelopt_parts(algorithm: str) -> tuple[dict[str, Tensor], Tensor]:
    """What ModelOpt stores, and the float64 weight that it stands for."""
    weight, generator = a_weight(), torch.Generator().manual_seed(1)
    if algorithm == "NVFP4":
        codes = torch.randint(0, 16, (40, 256), generator=generator, dtype=torch.uint8)
        scales = torch.rand(40, 16, generator=generator).to(torch.float8_e4m3fn)
        whole = torch.tensor(0.00371)
        exact = E2M1.double()[codes.int()].unflatten(1, (-1, 16)) * scales.double()[..., None] * whole.double()
        return {
            "weight": codes[:, 0::2] | codes[:, 1::2] << 4,
            "weight_scale": scales,
            "weight_scale_2": whole,
            "input_scale": torch.tensor(0.1),
        }, exact.flatten(1)
    codes = (weight.float() * 100).to(torch.float8_e4m3fn)
    scale = {
        "FP8": torch.tensor(0.01),
        "FP8_PER_CHANNEL_PER_TOKEN": torch.rand(40, generator=generator),
        "FP8_PB_WO": torch.rand(1, 1, 2, 1, generator=generator),
        "MXFP8": torch.randint(110, 130, (40, 8), generator=generator, dtype=torch.uint8),
    }[algorithm]
    by_weight = {
        "FP8": lambda: scale.double(),
        "FP8_PER_CHANNEL_PER_TOKEN": lambda: scale.double()[:, None],
        "FP8_PB_WO": lambda: scale.double().reshape(1, 2).repeat_interleave(128, 1),
        "MXFP8": lambda: (2.0 ** (scale.double() - 127)).repeat_interleave(32, 1),
    }[algorithm]()
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.1)}, codes.double() * by_weight


@pytest.mark.parametrize("where", ["config.json", "hf_quant_config.json"])
@pytest.mark.parametrize("algorithm", ["FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8", "NVFP4"])
def test_what_modelopt_stores_is_read_and_kept_at_its_width(tmp_path: Path, algorithm: str, where: str) -> None:
    parts, exact = modelopt_parts(algorithm)
    tensors = {f"{NAME}.{part}": tensor for part, tensor in parts.items()}
    said: dict[str, Any] = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algorithm}}
    if where == "config.json":
        said = {"quant_method": "modelopt", "quant_algo": algorithm.lower(), "ignore": ["lm_head"]}
    else:
        (tmp_path / where).write_text(json.dumps(said))
        (tmp_path / "config.json").write_text("{}")
    reader = saved(tmp_path, tensors, said if where == "config.json" else None)
    assert reader.names == (f"{NAME}.weight",) and reader.shape(f"{NAME}.weight") == (40, 256)
    found = reader.quantized(f"{NAME}.weight")
    assert found is not None and found.format == (FP4 if algorithm == "NVFP4" else FP8)
    torch.testing.assert_close(found.dequantize().double(), exact, rtol=2**-22, atol=0)
    assert torch.equal(unpack_weight(pack_weight(found)), found.dequantize())
    assert len(reader.notes) == 1 and algorithm in reader.notes[0]


BROKEN = {
    "scales of another shape": (
        "float8 by channels",
        lambda parts: parts | {"weight_scale": torch.ones(39, 1)},
        r"weight_scale of shape \[39, 1\] does not fit",
    ),
    "no scales": (
        "float8 by channels",
        lambda parts: {"weight": parts["weight"]},
        r"has no .*weight_scale, which belongs to a quantised weight",
    ),
    "NaN among codes": (
        "float8 by channels",
        lambda parts: parts | {"weight": torch.full((40, 256), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)},
        "holds NaN",
    ),
    "infinite scales": (
        "int8 by channels",
        lambda parts: parts | {"weight_scale": torch.full((40, 1), float("inf"))},
        "holds NaN or infinite values in its scales",
    ),
    "zero points": (
        "int8 by channels",
        lambda parts: parts | {"weight_zero_point": torch.ones(40, 1, dtype=torch.int8)},
        "8 bits with zero points",
    ),
    "an exponent of 255": (
        "MXFP4",
        lambda parts: parts | {"weight_scale": torch.full((40, 8), 255, dtype=torch.uint8)},
        "holds NaN or infinite values in its scales",
    ),
    "scales of half the groups": (
        "MXFP4",
        lambda parts: parts | {"weight_scale": parts["weight_scale"][:, :4]},
        r"has the shape \[40, 4\] and should have \[40, 8\]",
    ),
    "no scale for all": (
        "NVFP4",
        lambda parts: {name: part for name, part in parts.items() if name != "weight_global_scale"},
        r"has no .*weight_global_scale",
    ),
    "a scale for all that is 0": (
        "NVFP4",
        lambda parts: parts | {"weight_global_scale": torch.zeros(1)},
        "holds NaN or infinite values in its scales",
    ),
    "scales that are no float8": (
        "NVFP4",
        lambda parts: parts | {"weight_scale": parts["weight_scale"].float()},
        "NVFP4 has scales as float8_e4m3fn",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_parts_that_do_not_fit_together_are_named(tmp_path: Path, fault: str) -> None:
    kind, change, message = BROKEN[fault]
    parts, _, config = by_library(*LAYOUTS[kind][:2])
    changed = change({name: part.clone() for name, part in parts.items()})
    with pytest.raises(CheckpointError, match=message):
        reader = saved(
            tmp_path,
            {f"{NAME}.{part}": tensor for part, tensor in changed.items()},
            config,
        )
        reader.shape(f"{NAME}.weight")
        reader.read(f"{NAME}.weight")


def test_scales_of_a_cache_are_no_tensors_of_the_model(tmp_path: Path) -> None:
    parts, _ = modelopt_parts("FP8")
    tensors = {f"{NAME}.{part}": tensor for part, tensor in parts.items()}
    tensors |= {f"model.layers.0.self_attn.{it}_proj.{it}_scale": torch.tensor(1.5) for it in "kv"}
    reader = saved(tmp_path, tensors, {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"})
    assert reader.names == (f"{NAME}.weight",)


def test_zero_points_that_are_zero_change_nothing(tmp_path: Path) -> None:
    parts, expected, config = by_library(*LAYOUTS["int8 by channels"][:2])
    parts["weight_zero_point"] = torch.zeros(40, 1, dtype=torch.int8)
    reader = saved(tmp_path, {f"{NAME}.{part}": tensor for part, tensor in parts.items()}, config)
    assert reader.names == (f"{NAME}.weight",)
    torch.testing.assert_close(reader.read(f"{NAME}.weight"), expected.float(), rtol=2**-8, atol=0)


def test_modelopt_weights_whose_inputs_are_scaled_too_are_refused(tmp_path: Path) -> None:
    parts, _ = modelopt_parts("NVFP4")
    tensors = {f"{NAME}.{part}": tensor for part, tensor in parts.items()} | {
        f"{NAME}.pre_quant_scale": torch.ones(256)
    }
    with pytest.raises(CheckpointError, match="pre_quant_scale says that the inputs"):
        saved(tmp_path, tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4"})


def as_float8(weight: Tensor) -> dict[str, Tensor]:
    scales = torch.full((-(-weight.shape[0] // 32), -(-weight.shape[1] // 32)), float(weight.abs().max()) / 448)
    return {"": (weight / scales[0, 0]).to(torch.float8_e4m3fn), "_scale_inv": scales}


def as_nvfp4(weight: Tensor) -> dict[str, Tensor]:
    codes = (weight[..., None] / 0.25 - E2M1).abs().argmin(-1).to(torch.uint8)
    scales = torch.ones(len(weight), -(-weight.shape[1] // 16)).to(torch.float8_e4m3fn)
    return {"": codes[:, 0::2] | codes[:, 1::2] << 4, "_scale": scales, "_scale_2": torch.tensor(0.25)}


def as_int8(weight: Tensor) -> dict[str, Tensor]:
    scales = weight.abs().amax(-1, keepdim=True) / 127
    return {"": (weight / scales).round().to(torch.int8), "_scale": scales}


W8A8 = {
    **_WRITTEN,
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
        }
    },
}
WHOLE: dict[str, tuple[Callable[[Tensor], dict[str, Tensor]], dict[str, Any], str]] = {
    "DeepSeek's float8": (as_float8, {"quant_method": "fp8", "weight_block_size": [32, 32]}, "fp8"),
    "ModelOpt's NVFP4": (as_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "fp4"),
    "W8A8": (as_int8, W8A8, "int8"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_model_keeps_its_width_and_gives_the_logits_of_its_weights(tmp_path: Path, kind: str) -> None:
    stored_as, quantization, form = WHOLE[kind]
    shape = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_nextn_predict_layers": 0}
    source, tensors = write_model(tmp_path / "source", MLA | shape), {}
    before = CheckpointReader(source)
    for name in before.names:
        weight = before.read(name)
        linear = "_proj.weight" in name or "_proj_with_mqa.weight" in name
        tensors |= {name + part: it for part, it in stored_as(weight).items()} if linear else {name: weight}
    (tmp_path / "copy").mkdir()
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": quantization}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "copy" / "model.safetensors")
    read = read_config(tmp_path / "copy")
    assert checkpoint_dtype(read) == form and weight_bytes(read, form) > 0
    counted = stored_weights(str(tmp_path / "copy"), read)
    assert counted is None or counted.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    tokens = torch.randint(3, 60, (1, 20))
    with torch.inference_mode():
        plain, packed = (
            load_model(tmp_path / "copy", dtype=torch.float32, packing=packing) for packing in (None, Packing())
        )
        expected, found = (model.logits(model.forward_train(tokens)[0]) for model in (plain, packed))
    # The parts of kv_b_proj are multiplied apart, as bfloat16: of a product with float8 weights, 2^-9 is lost.
    assert (found - expected).abs().max() < 5e-3 * expected.abs().max()
    assert weight_format(packed) == form


def test_an_expert_of_kimi_k2_thinkings_shape_in_its_own_int4_is_read_bit_for_bit(tmp_path: Path) -> None:
    """Its experts are int4 in groups of 32 (2048 x 7168), by a config that names "Linear" and ignores all else."""
    from compressed_tensors.quantization import QuantizationConfig

    name = "model.layers.1.mlp.experts.383.gate_proj"
    published = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    **{"actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4},
                    **{"observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True},
                    "type": "int",
                },
            }
        },
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    }
    weight = a_weight(2048, 7168)
    scale = (weight.unflatten(1, (-1, 32)).abs().amax(-1) / 7.5).bfloat16()
    config = QuantizationConfig.model_validate(published)
    theirs = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    parts = theirs.compress({"weight": weight, "weight_scale": scale}, config.config_groups["group_0"])
    reader = saved(tmp_path, {f"{name}.{part}": tensor for part, tensor in parts.items()}, published)
    expected = theirs.decompress(dict(parts), config.config_groups["group_0"])["weight"]
    found = reader.quantized(f"{name}.weight")
    assert found is not None and found.group == 32 and found.scales.dtype == torch.bfloat16
    assert torch.equal(found.dequantize(torch.bfloat16), expected)
    packed = pack_weight(found)
    assert packed.nbytes == 2048 * 7168 * 4.5 / 8
    assert torch.equal(unpack_weight(packed), found.dequantize())
