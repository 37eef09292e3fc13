"""A GGUF file's tensors are those of the checkpoint that it was made of."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from gguf_models import write_deepseek2
from latentkv.checkpoint import CheckpointReader
from latentkv.checkpoint.gguf.tensors import GGUFTensors
from latentkv.checkpoint.tensors import open_tensors
from latentkv.errors import CheckpointError
from latentkv.llm_options import EMBEDDED_MODEL
from latentkv.models.loading import load_model
from latentkv.models.packing import Packing
from latentkv.models.stored_config import open_checkpoint, stored_dtype

KINDS = (Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.F16, Type.BF16)


def mixed(name: str, shape: tuple[int, ...]) -> Type:
    """Another type for each kind of tensor; what 32 does not divide stays bf16."""
    if shape[-1] % 32:
        return Type.BF16
    part = name.split(".")[-2]
    # Gates and ups of a layer are of one type, as in published files.
    return KINDS[len(part.replace("up", "gate")) % len(KINDS)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deepseek2(Path(str(EMBEDDED_MODEL)), tmp_path_factory.mktemp("gguf") / "plain.gguf")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deepseek2(Path(str(EMBEDDED_MODEL)), tmp_path_factory.mktemp("gguf") / "mixed.gguf", mixed)


def test_every_tensor_is_that_of_the_checkpoint_bit_for_bit(plain: Path) -> None:
    found, expected = open_tensors(plain), CheckpointReader(EMBEDDED_MODEL)
    assert isinstance(found, GGUFTensors)
    main = {name for name in expected.names if not name.startswith("model.layers.6.")}
    assert set(found.names) == main and len(found.names) == len(main)
    for name in found.names:
        assert found.shape(name) == expected.shape(name)
        assert torch.equal(found.read(name).float(), expected.read(name).float())
        assert found.why_unreadable(name) is None and not found.is_quantized(name)


def test_the_model_is_the_same_and_runs_in_the_dtype_of_most_weights(plain: Path) -> None:
    config, _ = open_checkpoint(plain)
    published, _ = open_checkpoint(Path(str(EMBEDDED_MODEL)))
    assert stored_dtype(config) == torch.bfloat16
    assert (config.attention, config.moe, config.rope) == (published.attention, published.moe, published.rope)
    assert (config.bos_token_id, config.eos_token_ids) == (published.bos_token_id, published.eos_token_ids)
    tokens = torch.randint(3, 4000, (1, 40))
    with torch.inference_mode():
        models = [load_model(source, dtype=torch.float32) for source in (plain, Path(str(EMBEDDED_MODEL)))]
        mine, theirs = (model.logits(model.forward_train(tokens)[0]) for model in models)
    assert torch.equal(mine, theirs)


def test_quantised_tensors_are_what_the_gguf_package_says_and_stay_integers(quantised: Path) -> None:
    tensors = GGUFTensors(quantised)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(quantised).tensors}
    for name, source in (
        ("model.layers.2.self_attn.o_proj.weight", "blk.2.attn_output.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        ("model.embed_tokens.weight", "token_embd.weight"),
    ):
        exact = torch.from_numpy(gguf.quants.dequantize(stored[source].data, stored[source].tensor_type).copy())
        assert torch.equal(tensors.read(name, torch.float32), exact)
        weight = tensors.quantized(name)
        assert (weight is not None) == tensors.is_quantized(name) == (tensors.shown_dtype(name)[0] == "Q")
        if weight is not None:
            assert torch.equal(weight.dequantize(), exact)
    experts = torch.from_numpy(
        gguf.quants.dequantize(stored["blk.3.ffn_up_exps.weight"].data, stored["blk.3.ffn_up_exps.weight"].tensor_type)
    )
    assert torch.equal(tensors.read("model.layers.3.mlp.experts.5.up_proj.weight", torch.float32), experts[5])
    total = sum(tensor.n_bytes for tensor in stored.values())
    assert sum(tensors.nbytes(name) for name in tensors.names) == total


def test_a_packed_model_gives_the_logits_of_the_files_weights(quantised: Path) -> None:
    tokens = torch.randint(3, 4000, (1, 40))
    with torch.inference_mode():
        exact = load_model(quantised, dtype=torch.float32)
        packed = load_model(quantised, dtype=torch.float32, packing=Packing())
        expected, found = (model.logits(model.forward_train(tokens)[0]) for model in (exact, packed))
    assert packed.packed_embedding is not None and packed.packed_embedding.format == "int5"  # the tied head stays so
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()
    assert (found.argmax(-1) == expected.argmax(-1)).all()


def test_infinite_scales_are_told_with_the_tensors_name(tmp_path: Path, quantised: Path) -> None:
    reader = gguf.GGUFReader(quantised)
    tensor = next(tensor for tensor in reader.tensors if tensor.tensor_type == Type.Q8_0 and "blk.1" in tensor.name)
    damaged = bytearray(quantised.read_bytes())
    damaged[int(tensor.data_offset) : int(tensor.data_offset) + 2] = b"\x00\x7c"
    (tmp_path / "x.gguf").write_bytes(damaged)
    tensors = GGUFTensors(tmp_path / "x.gguf")
    name = next(name for name in tensors.names if tensors._recipe(name).sources == (tensor.name,))
    for read in (tensors.read, tensors.quantized):
        with pytest.raises(CheckpointError, match=f"{name} of .*x.gguf .*infinite"):
            read(name)


def test_types_whose_codes_stand_for_runs_are_noted_with_the_memory_that_they_take(tmp_path: Path) -> None:
    def type_of(name: str, shape: tuple[int, ...]) -> Type:
        return (
            Type.TQ2_0
            if shape[-1] % 256 == 0 and "attn_output" in name
            else Type.Q8_0
            if "attn_q" in name
            else Type.BF16
        )

    tensors = open_tensors(write_deepseek2(Path(str(EMBEDDED_MODEL)), tmp_path / "ternary.gguf", type_of))
    (note,) = tensors.notes
    assert note.startswith("TQ2_0 (") and "tensors) as 4 bits a weight in memory" in note
    name = "model.layers.1.self_attn.o_proj.weight"
    weight = tensors.quantized(name)
    assert weight is not None and (weight.format.name, weight.group) == ("int4", 256)
    assert torch.equal(weight.dequantize(), tensors.read(name))
