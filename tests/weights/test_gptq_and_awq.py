"""Weights as GPTQ's and AWQ's tools store them, packed here by hand as their layouts are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from latentkv import LLM
from latentkv.checkpoint import CheckpointReader
from latentkv.errors import CheckpointError
from latentkv.models.config_reader import read_config
from latentkv.models.loading import load_model
from latentkv.models.packing import Packing
from latentkv.models.parameters import checkpoint_dtype
from latentkv.plan import stored_weights, weight_bytes
from latentkv.weights import pack_weight
from latentkv.weights.formats import INT4, INT8, UINT4
from latentkv.weights.layout import unpack_weight
from stored_models import GQA, write_model

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def words(numbers: Tensor, bits: int = 4) -> Tensor:
    """[rows, n] numbers to [rows, n * bits / 32] int32, the first of a word lowest."""
    parts = numbers.long().unflatten(1, (-1, 32 // bits)) << bits * torch.arange(32 // bits)
    return parts.sum(-1).to(torch.uint32).view(torch.int32)


def drawn(outs: int, ins: int, group: int, bits: int = 4, *, symmetric: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [D, O], zeros [groups, O], scales [groups, O]."""
    groups = ins // group
    zeros = torch.randint(1, 2**bits, (groups, outs))
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    return torch.randint(2**bits, (ins, outs)), zeros, (torch.rand(groups, outs) * 0.02 + 0.001).half()


def exact(codes: Tensor, zeros: Tensor, scales: Tensor, group: int) -> Tensor:
    """[O, D] float64."""
    spread = [t.double().repeat_interleave(group, 0) for t in (zeros, scales)]
    return ((codes - spread[0]) * spread[1]).T


def gptq_parts(codes: Tensor, zeros: Tensor, scales: Tensor, group: int, bits: int = 4, less: int = 1) -> dict:
    return {
        "qweight": words(codes.T, bits).T.contiguous(),
        "qzeros": words((zeros - less) % 2**bits, bits),
        "scales": scales,
        "g_idx": (torch.arange(len(codes)) // group).int(),
    }


def awq_parts(codes: Tensor, zeros: Tensor, scales: Tensor) -> dict:
    def ordered(numbers: Tensor) -> Tensor:
        return words(numbers.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1))

    return {"qweight": ordered(codes), "qzeros": ordered(zeros), "scales": scales}


def reader_of(folder: Path, parts: dict[str, Tensor], config: dict[str, Any]) -> CheckpointReader:
    save_file({f"m.{name}": tensor for name, tensor in parts.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return CheckpointReader(folder)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "awq"])
def test_a_weight_is_scale_times_code_less_zero_exactly_and_stays_four_bits(
    tmp_path: Path, form: str, symmetric: bool
) -> None:
    drawing = drawn(24, 96, 32, symmetric=symmetric)
    if form == "awq":
        reader = reader_of(tmp_path, awq_parts(*drawing), AWQ)
    else:
        parts = gptq_parts(*drawing, 32, less=int(form == "gptq"))
        reader = reader_of(tmp_path, parts, GPTQ | {"checkpoint_format": form})
    assert reader.names == ("m.weight",) and reader.shape("m.weight") == (24, 96)
    assert reader.shown_dtype("m.weight") == ("AWQ int4" if form == "awq" else "GPTQ int4")
    weight = reader.quantized("m.weight")
    assert weight is not None and weight.format == (INT4 if symmetric else UINT4)
    expected = exact(*drawing, 32)
    if symmetric:
        assert torch.equal(weight.dequantize(torch.float64), expected)
    else:  # one rounding of float32 where two products are summed
        assert (weight.dequantize().double() - expected).abs().max() <= 2**-22 * 16 * 0.021
    assert torch.equal(unpack_weight(pack_weight(weight)), weight.dequantize())
    assert pack_weight(weight).format == ("int4" if symmetric else "uint4")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 64, "damp_percent": 0.01, "desc_act": False, "sym": True}),
        ("quant_config.json", {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}),
    ],
)
def test_older_releases_say_how_they_were_quantised_in_a_file_beside_the_config(
    tmp_path: Path, file: str, said: dict
) -> None:
    drawing = drawn(24, 128, 64)
    parts = awq_parts(*drawing) if file == "quant_config.json" else gptq_parts(*drawing, 64)
    save_file({f"m.{name}": tensor for name, tensor in parts.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps(said))
    weight = CheckpointReader(tmp_path).quantized("m.weight")
    assert weight is not None and weight.group == 64
    assert (weight.dequantize().double() - exact(*drawing, 64)).abs().max() <= 2**-22 * 16 * 0.021
    (tmp_path / file).write_text(json.dumps(said | {"bits": 3, "w_bit": 3}))
    with pytest.raises(CheckpointError, match="bits is 3"):
        CheckpointReader(tmp_path).quantized("m.weight")


def test_gptq_of_8_bits_and_one_scale_a_row_is_read(tmp_path: Path) -> None:
    drawing = drawn(8, 64, 64, bits=8, symmetric=True)
    reader = reader_of(tmp_path, gptq_parts(*drawing, 64, bits=8), GPTQ | {"bits": 8, "group_size": -1})
    weight = reader.quantized("m.weight")
    assert weight is not None and (weight.format, weight.group) == (INT8, 64)
    assert torch.equal(weight.dequantize(torch.float64), exact(*drawing, 64))


def test_an_order_of_inputs_that_is_their_own_is_none_and_another_is_refused(tmp_path: Path) -> None:
    drawing = drawn(8, 64, 32)
    parts = gptq_parts(*drawing, 32)
    assert reader_of(tmp_path, parts, GPTQ | {"desc_act": True}).quantized("m.weight") is not None
    without = {name: tensor for name, tensor in parts.items() if name != "g_idx"}
    assert reader_of(tmp_path, without, GPTQ).quantized("m.weight") is not None
    with pytest.raises(CheckpointError, match=r"desc_act says that m has an order .* no m\.g_idx"):
        reader_of(tmp_path, without, GPTQ | {"desc_act": True})
    parts["g_idx"] = parts["g_idx"].flip(0).contiguous()
    with pytest.raises(CheckpointError, match=r"m was quantised in another order .* \(desc_act\)"):
        reader_of(tmp_path, parts, GPTQ).quantized("m.weight")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPTQ | {"bits": 3}, "bits is 3: of GPTQ's only 4 and 8"),
        (GPTQ | {"bits": True}, "bits is True"),
        (GPTQ | {"group_size": 12}, "group_size is 12"),
        (GPTQ | {"group_size": None}, "group_size is None"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        (GPTQ | {"checkpoint_format": []}, "checkpoint_format is"),
        (GPTQ | {"dynamic": {"-:.*": {}}}, "dynamic is"),
        (AWQ | {"bits": 8}, "bits is 8: of AWQ's only 4"),
        (AWQ | {"version": "gemv"}, "version is 'gemv'"),
        (AWQ | {"group_size": 0}, "group_size is 0"),
        (AWQ | {"group_size": 64}, r"m\.qzeros has the shape \[2, 1\] and should have \[1, 1\]"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_key(tmp_path: Path, config: dict, message: str) -> None:
    drawing = drawn(8, 64, 32)
    parts = awq_parts(*drawing) if config["quant_method"] == "awq" else gptq_parts(*drawing, 32)
    with pytest.raises(CheckpointError, match=message):
        reader_of(tmp_path, parts, config).quantized("m.weight")


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_damaged_parts_are_told_by_their_names(tmp_path: Path, part: str) -> None:
    parts = gptq_parts(*drawn(8, 64, 32), 32)
    wrong = {**parts, part: parts[part].float()} if part != "scales" else {**parts, part: parts[part] * float("nan")}
    with pytest.raises(CheckpointError, match=r"m\.(qweight|qzeros) is stored as|scales of m\.weight hold NaN"):
        reader_of(tmp_path, wrong, GPTQ).quantized("m.weight")
    if part != "qweight":
        del parts[part]
        with pytest.raises(CheckpointError, match=rf"has no m\.{part}, which belongs to a quantised weight"):
            reader_of(tmp_path, parts, GPTQ)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_model_runs_packed_and_gives_the_logits_of_its_weights(tmp_path: Path, method: str) -> None:
    source = write_model(tmp_path / "source", GQA | {"hidden_size": 64, "intermediate_size": 96, "dtype": "bfloat16"})
    before, tensors = CheckpointReader(source), {}
    for name in before.names:
        weight = before.read(name)
        if "_proj.weight" not in name:
            tensors[name] = weight
            continue
        outs, ins = weight.shape
        drawing = drawn(outs, ins, 32)
        parts = awq_parts(*drawing) if method == "awq" else gptq_parts(*drawing, 32)
        tensors |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    (tmp_path / "copy").mkdir()
    save_file(tensors, tmp_path / "copy" / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(
        json.dumps(config | {"quantization_config": AWQ if method == "awq" else GPTQ})
    )
    counted = stored_weights(str(tmp_path / "copy"), read_config(tmp_path / "copy"))
    assert counted is not None and counted.nbytes == sum(
        tensor.nbytes for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")
    )
    assert weight_bytes(read_config(config | {"quantization_config": AWQ}), "int4") > 0
    assert checkpoint_dtype(read_config(config | {"quantization_config": AWQ})) == "int4"
    tokens = torch.randint(3, 60, (1, 20))
    with torch.inference_mode():
        plain, packed = (
            load_model(tmp_path / "copy", dtype=torch.float32, packing=packing) for packing in (None, Packing())
        )
        expected, found = (model.logits(model.forward_train(tokens)[0]) for model in (plain, packed))
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()
    assert len(LLM(tmp_path / "copy", kv_cache_bytes=1 << 20).generate([[5, 6, 7]])[0].token_ids) > 0
