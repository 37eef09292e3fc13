"""Shards of a model: together they are the whole, tensor by tensor, and add up to what the whole computes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families_for_tests import FIRST_CASES, KINDS, Case, slow_but
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from test_packing import IDS, PAGE, checkpoint, logits
from torch import Tensor

from engine_models import CONFIGS, LING25
from gguf_models import write_deepseek2
from latentkv import kernels
from latentkv.errors import ConfigError
from latentkv.llm_options import embedded_model
from latentkv.models.batch import Batch, SlotUse
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.loading import load_model
from latentkv.models.packing import Packing
from latentkv.models.shard import Shard, require_can_be_shared_out
from latentkv.models.stage import Stage
from latentkv.models.stored_config import open_checkpoint
from latentkv.parallel.messages import Kind, Message
from latentkv.quantize import quantize_checkpoint
from latentkv.state import PagedCache
from latentkv.weights.formats import INT4, INT8
from latentkv.weights.layout import unpack_weight
from local_team import local_teams, together
from stored_models import MLA, write_model

pytestmark = pytest.mark.skipif(kernels.extension is None, reason="the native kernels are not built")

STORED = {
    **MLA,
    "rms_norm_eps": 1e-6,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "v_head_dim": 16,
}
REFUSED = {
    "longcat_flash": "its experts stand at the end of shortcuts",
    "olmoe": "its queries are normed over all heads together",
}
"""What of each family that cannot be shared out the sentence says."""


def shards_of(model: Path, count: int, packing: Packing | None = None) -> list[Decoder]:
    """All shards of a model, each ready to be run beside the others."""
    config, _ = open_checkpoint(model)
    require_can_be_shared_out(config, count)
    stage = Stage.whole(config.num_layers)
    decoders = [load_model(model, packing=packing, stage=stage.sharded(Shard(i, count))) for i in range(count)]
    widths = [len(Shard(0, count).head_rows(config.vocab_size, i)) for i in range(count)]
    for decoder, team in zip(decoders, local_teams(widths), strict=True):
        decoder.join(team)
    return decoders


def logits_of(decoders: list[Decoder]) -> Tensor:
    """What all give together for the steps of `test_packing.logits`."""

    def work(rank: int) -> list[Tensor]:
        decoder = decoders[rank]
        kept = decoder.stage.shard.config(decoder.config)
        cache = PagedCache(kept.specs("fp32"), num_pages=4, page_size=PAGE, num_slots=1)
        pages, rows, done = cache.pool.allocate(4), [], 0
        with torch.inference_mode():
            for length in [20, 17, *[1] * 8]:
                slots = [SlotUse(slot=0, pending=0, committed=length)] if cache.num_slots else None
                batch = Batch.build([IDS[done : done + length]], [done], [pages], page_size=PAGE, slots=slots)
                team = decoder.model.layers[0].team
                with team.step(Message(Kind.STEP, x=decoder.embedded(batch)) if rank == 0 else None) as message:
                    hidden = decoder.run_layers(message.x, decoder.rotary(batch.positions), batch, cache)
                if rank == 0:
                    rows.append(decoder.logits(hidden))
                else:
                    with team.step() as message:
                        team.gather(decoder.own_logits(message.x))
                done += length
        return rows

    return torch.cat(together(work, len(decoders))[0])


def can_be_shared_out(case: Case, count: int = 2) -> bool:
    try:
        require_can_be_shared_out(open_checkpoint(checkpoint(case.name))[0], count)
    except ConfigError as error:
        assert REFUSED[case.model_type] in str(error)
        return False
    return True


@pytest.mark.parametrize("case", slow_but(FIRST_CASES, KINDS), ids=lambda case: case.name)
def test_shards_add_up_to_the_whole(case: Case):
    if can_be_shared_out(case):
        whole = logits(load_model(checkpoint(case.name)))
        assert float((logits_of(shards_of(checkpoint(case.name), 2)) - whole).abs().max() / whole.abs().max()) < 1e-5


@pytest.mark.parametrize("packing", [Packing(INT8), Packing(INT4)], ids=["int8", "int4"])
@pytest.mark.parametrize("name", ["v3", "kimi-linear", pytest.param("qwen2-moe", marks=pytest.mark.slow)])
def test_packed_shards_add_up_to_the_packed_whole(name: str, packing: Packing):
    whole = logits(load_model(checkpoint(name), packing=packing))
    assert float((logits_of(shards_of(checkpoint(name), 2, packing)) - whole).abs().max() / whole.abs().max()) < 1e-4


def test_shards_need_not_be_alike():
    whole = logits(load_model(checkpoint("v3")))
    shards = shards_of(checkpoint("v3"), 3)
    heads = [decoder.model.layers[0].self_attn.num_heads for decoder in shards]
    assert len(set(heads)) > 1 or sum(heads) % 3 == 0
    assert float((logits_of(shards) - whole).abs().max() / whole.abs().max()) < 1e-5


def joined(parts: list[Tensor], whole: Tensor) -> Tensor | None:
    """Parts of a tensor put together along the axis that they are cut at, in one piece or in several; None: neither."""
    if all(part.shape == whole.shape for part in parts):
        return parts[0]
    axis = next(axis for axis in range(whole.ndim) if parts[0].shape[axis] != whole.shape[axis])
    for pieces in (1, 2, 3):
        if all(part.shape[axis] % pieces == 0 for part in parts):
            cut = [part.chunk(pieces, axis) for part in parts]
            together_ = torch.cat([torch.cat(each, axis) for each in zip(*cut, strict=True)], axis)
            if torch.equal(together_, whole):
                return together_
    return None


@pytest.mark.parametrize("case", slow_but(FIRST_CASES, KINDS), ids=lambda case: case.name)
def test_shards_together_have_every_number_once(case: Case):
    if not can_be_shared_out(case):
        return
    whole = dict(load_model(checkpoint(case.name)).state_dict())
    states: list[Mapping[str, Tensor]] = [decoder.state_dict() for decoder in shards_of(checkpoint(case.name), 2)]
    if "lm_head.weight" not in whole:
        whole["lm_head.weight"] = whole["model.embed_tokens.weight"]
    shared = 0
    for name, tensor in whole.items():
        parts = [state[name] for state in states if name in state]
        if name.endswith(("o_proj.bias", "down_proj.bias")) and not name.startswith("mtp."):
            assert torch.equal(parts[0], tensor) and not parts[1].any()
            continue
        assert torch.equal(joined(parts, tensor), tensor), name
        shared += tensor.numel() if parts[0].shape != tensor.shape else 0
    # What is many numbers is shared out: nine tenths of them but for the embedding, and MTP, which the first one has.
    rest = sum(t.numel() for name, t in whole.items() if not name.startswith(("mtp.", "model.embed")))
    assert shared > 0.6 * rest


def packed(decoder: Decoder) -> dict[str, Tensor]:
    return {
        f"{name}.{leaf}": unpack_weight(value).view(value.count, value.out_features, value.in_features)
        for name, module in decoder.model.named_modules(prefix="model")
        for leaf, value in vars(module).items()
        if hasattr(value, "rounds_input")
    }


@pytest.mark.parametrize("packing", [Packing(INT8), Packing(INT4)], ids=["int8", "int4"])
def test_what_is_rounded_while_loading_is_rounded_as_in_one_process(packing: Packing):
    whole = packed(load_model(checkpoint("v3"), packing=packing))
    parts = [packed(decoder) for decoder in shards_of(checkpoint("v3"), 2, packing)]
    for name, weight in whole.items():
        if not name.startswith("mtp."):
            assert torch.equal(joined([part[name] for part in parts], weight), weight), name


def _blocks_of_8_bits(name: str, shape: tuple[int, ...]) -> Type:
    return Type.BF16 if shape[-1] % 32 else Type.Q8_0


def stored_as(how: str, folder: Path) -> Path:
    """A model whose weights are stored quantised, written to `folder`."""
    if how == "q8_0":
        return write_deepseek2(embedded_model(), folder / "m.gguf", _blocks_of_8_bits)
    plain = write_model(folder / "plain", STORED)
    if how.startswith("int"):
        fmt, _, group = how.partition(" in groups of ")
        quantize_checkpoint(plain, folder / "m", fmt, int(group) if group else None)
        return folder / "m"
    weights = load_file(plain / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        rows, columns = weights[name].shape
        weights[f"{name}_scale_inv"] = torch.rand(-(-rows // 128), -(-columns // 128)) * 0.01
        weights[name] = (weights[name] * 100).to(torch.float8_e4m3fn)
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (plain / "config.json").write_text(json.dumps(config))
    return plain


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("how", ["int8", "int4", "int8 in groups of 32", "int4 in groups of 32", "fp8", "q8_0"])
@pytest.mark.thin(meet=1)
def test_shards_of_stored_codes_stand_for_the_numbers_of_the_whole(how: str, count: int, tmp_path: Path):
    folder = stored_as(how, tmp_path)
    whole = packed(load_model(folder, packing=Packing()))
    parts = [packed(decoder) for decoder in shards_of(folder, count, Packing())]
    cut = 0
    for name, weight in whole.items():
        assert torch.equal(joined([part[name] for part in parts], weight), weight), name
        cut += parts[0][name].shape != weight.shape
    assert cut >= 12


@pytest.mark.parametrize(
    ("count", "changes", "expected"),
    [
        (5, {}, "tensor_parallel=5 cannot be had: a layer has 4 heads"),
        (2, {"moe_intermediate_size": 1, "n_shared_experts": 0}, "a feed-forward block is 1 wide"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_with_the_reason(count: int, changes: dict[str, int], expected: str):
    config = read_config({**CONFIGS["mla"], "num_attention_heads": 4, "num_key_value_heads": 4, **changes})
    with pytest.raises(ConfigError, match=expected):
        require_can_be_shared_out(config, count)


def test_lightning_attention_is_refused_whose_norm_is_of_all_heads():
    with pytest.raises(ConfigError, match="lightning attention norms what all of its heads give together"):
        require_can_be_shared_out(read_config(LING25), 2)


@pytest.mark.parametrize(
    ("width", "count", "parts"), [(1408, 2, [704, 704]), (1536, 4, [384] * 4), (2048, 8, [256] * 8)]
)
def test_the_width_of_experts_is_shared_out_evenly(width: int, count: int, parts: list[int]):
    config = read_config({**CONFIGS["mla"], "moe_intermediate_size": width, "num_attention_heads": 8})
    moe = len(config.layers) - 1
    found = [Shard(index, count).layer(config, moe)[1].moe for index in range(count)]
    assert [each.intermediate_size for each in found if each] == parts


def test_vocabularies_are_shared_out_in_blocks_of_the_kernels():
    rows = [Shard(index, 3).head_rows(102_400) for index in range(3)]
    assert [each.start % 32 for each in rows] == [0, 0, 0]
    assert [each.start for each in rows[1:]] == [each.stop for each in rows[:-1]] and rows[-1].stop == 102_400
    assert max(map(len, rows)) - min(map(len, rows)) <= 32


def test_a_shard_says_which_it_is():
    stage = Stage(0, 4, 8).sharded(Shard(1, 2))
    assert str(stage) == "part 2 of 2 of layers 0-3"
    assert not stage.reads_tokens and stage.is_first
    assert replace(stage, shard=Shard(0, 2)).reads_tokens
