import json

import pytest
import torch
from safetensors.torch import save_file

from latentkv.checkpoint import CheckpointReader
from latentkv.errors import CheckpointError

FP8 = torch.float8_e4m3fn


def by_hand(weight: torch.Tensor, scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Each element times the scale of its block, as the definition says."""
    i, j = torch.arange(weight.shape[0]), torch.arange(weight.shape[1])
    return weight.float() * scale[i[:, None] // rows, j[None] // columns]


def quantised(shape, blocks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(shape, generator=generator) * 100).clamp(-448, 448).to(FP8)
    grid = [-(-n // b) for n, b in zip(shape, blocks, strict=True)]
    return weight, torch.rand(grid, generator=generator) * 0.01 + 1e-4


def saved(folder, tensors, quantization=None, wrapped=False):
    save_file(tensors, folder / "model.safetensors")
    if quantization is not None:
        config = {"quantization_config": quantization}
        (folder / "config.json").write_text(json.dumps({"text_config": config} if wrapped else config))
    return CheckpointReader(folder)


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        ((256, 128), (128, 128)),
        ((130, 257), (128, 128)),
        ((5, 7), (128, 128)),
        ((37, 50), (16, 8)),
        ((33, 64), (32, 64)),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_blocks_and_odd_edges_are_dequantised_as_by_hand(tmp_path, shape, blocks, wrapped):
    weight, scale = quantised(shape, blocks)
    config = {"quant_method": "fp8", "weight_block_size": list(blocks)}
    reader = saved(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale}, config, wrapped)
    assert reader.names == ("a.weight",)
    assert "a.weight_scale_inv" not in reader
    assert (reader.shape("a.weight"), reader.dtype("a.weight")) == (shape, FP8)
    expected = by_hand(weight, scale, *blocks)
    assert torch.equal(reader.read("a.weight"), expected)
    assert torch.equal(reader.read("a.weight", dtype=torch.bfloat16), expected.to(torch.bfloat16))


def test_without_a_config_blocks_are_128_by_128(tmp_path):
    weight, scale = quantised((200, 300), (128, 128))
    reader = saved(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale})
    assert torch.equal(reader.read("a.weight"), by_hand(weight, scale, 128, 128))


def test_a_scale_in_another_shard_is_found(tmp_path):
    weight, scale = quantised((130, 20), (128, 128))
    save_file({"a.weight": weight}, tmp_path / "model-1.safetensors")
    save_file({"a.weight_scale_inv": scale, "b": torch.ones(2)}, tmp_path / "model-2.safetensors")
    weight_map = {
        "a.weight": "model-1.safetensors",
        "a.weight_scale_inv": "model-2.safetensors",
        "b": "model-2.safetensors",
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    reader = CheckpointReader(tmp_path)
    assert reader.names == ("a.weight", "b")
    assert torch.equal(reader.read("a.weight"), by_hand(weight, scale, 128, 128))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_scale_for_the_whole_weight(tmp_path, shape):
    weight, _ = quantised((40, 24), (40, 24))
    scale = torch.full(shape, 0.25)
    config = {"quant_method": "fp8", "weight_block_size": None}
    tensors = {"a.weight": weight, "a.weight_scale_inv": scale, "a.activation_scale": torch.tensor(3.0)}
    reader = saved(tmp_path, tensors, config)
    assert reader.names == ("a.weight",)
    assert torch.equal(reader.read("a.weight"), weight.float() * 0.25)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_fused_experts_have_scales_of_their_own(tmp_path, per_tensor):
    pairs = [quantised((70, 33), (70, 33) if per_tensor else (32, 32), seed) for seed in range(3)]
    weight, scale = torch.stack([w for w, _ in pairs]), torch.stack([s for _, s in pairs])
    tensors = {"experts.down_proj": weight, "experts.down_proj_scale_inv": scale}
    config = {"quant_method": "fp8", "weight_block_size": None if per_tensor else [32, 32]}
    reader = saved(tmp_path, tensors | {"experts.down_proj_activation_scale": torch.ones(3)}, config)
    assert reader.names == ("experts.down_proj",)
    expected = torch.stack([by_hand(w, s, *((70, 33) if per_tensor else (32, 32))) for w, s in pairs])
    assert torch.equal(reader.read("experts.down_proj"), expected)


def test_float8_without_scales_is_refused(tmp_path):
    reader = saved(tmp_path, {"a.weight": quantised((4, 4), (4, 4))[0]})
    with pytest.raises(CheckpointError, match=r"a\.weight has no a\.weight_scale_inv"):
        reader.read("a.weight")


def test_scales_that_do_not_fit_are_refused_with_both_shapes(tmp_path):
    weight, _ = quantised((256, 256), (128, 128))
    reader = saved(tmp_path, {"a.weight": weight, "a.weight_scale_inv": torch.ones(3, 2)})
    with pytest.raises(CheckpointError, match=r"a\.weight_scale_inv of shape \[3, 2\] .* needs \[2, 2\]"):
        reader.read("a.weight")


@pytest.mark.parametrize("where", ["weight", "scale"])
def test_nan_in_a_quantised_weight_is_named(tmp_path, where):
    weight, scale = quantised((130, 130), (128, 128))
    if where == "weight":
        weight.view(torch.uint8)[129, 5] = 0x7F  # e4m3fn's NaN
    else:
        scale[1, 1] = float("nan")
    reader = saved(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale})
    with pytest.raises(CheckpointError, match=r"a\.weight holds NaN"):
        reader.read("a.weight", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "hqq"}, "quantised by HQQ"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": "big"}, "weight_block_size"),
    ],
)
def test_other_quantisations_are_refused_by_name(tmp_path, config, message):
    with pytest.raises(CheckpointError, match=message):
        saved(tmp_path, {"a": torch.ones(1)}, config)


@pytest.mark.parametrize("stored", ["uint8", "float8_e8m0fnu", "float32"])
def test_exponents_as_scales_are_powers_of_two(tmp_path, stored):
    weight, _ = quantised((64, 48), (32, 16))
    exponents = torch.tensor([[0, 1, 127], [120, 130, 200]], dtype=torch.uint8)
    by_definition = torch.tensor([[2.0 ** (int(s) - 127) for s in row] for row in exponents])
    scale = {"uint8": exponents, "float8_e8m0fnu": exponents.view(torch.float8_e8m0fnu), "float32": by_definition}
    config = {"quant_method": "fp8", "weight_block_size": [32, 16], "scale_fmt": "ue8m0"}
    reader = saved(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale[stored]}, config)
    assert reader.why_unreadable("a.weight") is None
    assert torch.equal(reader.read("a.weight"), by_hand(weight, by_definition, 32, 16))
    assert reader.nbytes("a.weight") == 64 * 48 + 6 * scale[stored].itemsize


@pytest.mark.parametrize("stored", [torch.uint8, torch.float8_e8m0fnu])
def test_the_exponent_255_is_nan_and_the_tensor_is_named(tmp_path, stored):
    weight, _ = quantised((4, 4), (4, 4))
    scale = torch.full((1, 1), 255, dtype=torch.uint8).view(stored)
    reader = saved(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale}, {"scale_fmt": "ue8m0"})
    with pytest.raises(CheckpointError, match=r"a\.weight holds NaN"):
        reader.read("a.weight")


@pytest.mark.parametrize(
    ("dtype", "scale_fmt", "named"),
    [
        (torch.uint8, None, "uint8.*scale_fmt 'ue8m0'"),
        (torch.uint8, "float", "uint8.*scale_fmt 'ue8m0'"),
        (torch.int8, "ue8m0", "int8"),
        (torch.int32, None, "int32"),
        (torch.uint16, "ue8m0", "uint16"),
        (torch.float8_e4m3fn, None, "float8_e4m3fn"),
        (torch.bool, "ue8m0", "bool"),
        (torch.complex64, None, "complex64"),
    ],
)
def test_scales_of_another_dtype_are_refused_by_name(tmp_path, dtype, scale_fmt, named):
    weight, _ = quantised((4, 4), (4, 4))
    config = {"quant_method": "fp8", "scale_fmt": scale_fmt}
    reader = saved(tmp_path, {"a.weight": weight, "a.weight_scale_inv": torch.zeros(1, 1, dtype=dtype)}, config)
    assert "a.weight_scale_inv is stored as" in reader.why_unreadable("a.weight")
    with pytest.raises(CheckpointError, match=rf"scale a\.weight_scale_inv is stored as {named}"):
        reader.read("a.weight")


def test_an_unknown_format_of_scales_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"scale_fmt is 'e5m3'.*'ue8m0'"):
        saved(tmp_path, {"a": torch.ones(1)}, {"quant_method": "fp8", "scale_fmt": "e5m3"})
