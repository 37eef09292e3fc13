"""Which of a GGUF file's tensors a published tensor is made of, and that it comes out as it went in."""

import pytest
import torch
from gguf_metadata import (
    VOCAB,
    D,
    H,
    L,
    N,
    V,
    deepseek,
    deepseek_shapes,
    grouped,
    grouped_shapes,
    minicpm3,
    minicpm3_shapes,
    predicting_shapes,
)

from latentkv.checkpoint.gguf.config import config_of
from latentkv.checkpoint.gguf.names import sources_of, stacked_experts
from latentkv.checkpoint.gguf.recipes import JoinedHeads, Rows
from latentkv.checkpoint.names import published_parts
from latentkv.errors import CheckpointError
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder

V3 = {"expert_gating_func": 2, "expert_weights_norm": True}
FACTORS = {f"rope_factors_{kind}.weight": [1.0] * 4 for kind in ("long", "short")}
FILES = {
    "new": (deepseek(**V3), deepseek_shapes()),
    "new, without q_lora": (deepseek(q_lora=None, **V3), deepseek_shapes(q_lora=None)),
    "old": (deepseek(age="old"), deepseek_shapes(age="old", sigmoid=False)),
    "ik": (deepseek(age="ik", **V3), deepseek_shapes(age="ik")),
    "fused experts": (deepseek(**V3), deepseek_shapes(fused=True)),
    "no experts": (deepseek(experts=0), deepseek_shapes(experts=0, tied=True)),
    "mistral4": (
        deepseek("mistral4", expert_weights_norm=True, leading_dense_block_count=0),
        deepseek_shapes(sigmoid=False, fused=True, sparse_from=0),
    ),
    "predicting": (
        deepseek(blocks=4, nextn_predict_layers=1, **V3),
        deepseek_shapes(blocks=4) | predicting_shapes(3),
    ),
    "minicpm3": (minicpm3(), minicpm3_shapes()),
    "llama": (grouped(), grouped_shapes() | {"rope_freqs.weight": (8,)}),
    "qwen2": (grouped("qwen2"), grouped_shapes("qwen2", tied=False)),
    "qwen3": (grouped("qwen3", head_dim=32), grouped_shapes("qwen3", head_dim=32)),
}


def sources(metadata, shapes):
    config = config_of(metadata, shapes, FACTORS | {"rope_freqs.weight": [1.0] * 8})
    return config, sources_of(config, shapes)


@pytest.mark.parametrize("file", FILES)
def test_every_tensor_of_the_model_is_named_with_its_shape(file):
    config, found = sources(*FILES[file])
    read = read_config(config)
    with torch.device("meta"):
        state = Decoder(read).state_dict()
    expected = {
        part: tuple(view.shape)
        for name, tensor in state.items()
        for part, view in published_parts(name, tensor, read.num_layers)
    }
    assert {name: recipe.shape for name, recipe in found.items()} == expected


def test_kv_b_is_joined_from_its_halves_exactly():
    torch.manual_seed(0)
    published = torch.randn(H * (N + V), L)
    heads = published.view(H, N + V, L)
    keys, values = heads[:, :N].transpose(1, 2).contiguous(), heads[:, N:].contiguous()
    _, found = sources(*FILES["new"])
    recipe = found["model.layers.2.self_attn.kv_b_proj.weight"]
    assert recipe == JoinedHeads("blk.2.attn_k_b.weight", "blk.2.attn_v_b.weight", H, (H * (N + V), L))
    assert torch.equal(recipe.join(keys, values), published)
    # The first files with halves have them as matrices.
    assert torch.equal(recipe.join(keys.view(H * L, N), values.view(H * V, L)), published)


def test_kv_b_on_numbers_by_hand():
    recipe = JoinedHeads("k", "v", 2, (6, 2))  # 2 heads, N = 2, V = 1, L = 2
    keys = torch.tensor([[[1, 3], [2, 4]], [[7, 9], [8, 10]]])
    values = torch.tensor([[[5, 6]], [[11, 12]]])
    assert recipe.join(keys, values).tolist() == [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12]]


@pytest.mark.parametrize("file", ["old", "ik"])
def test_a_whole_kv_b_is_taken_as_it_is(file):
    _, found = sources(*FILES[file])
    assert found["model.layers.0.self_attn.kv_b_proj.weight"] == Rows("blk.0.attn_kv_b.weight", (H * (N + V), L))


def test_halves_as_matrices_are_taken_where_there_is_no_whole():
    shapes = {k: v for k, v in deepseek_shapes(age="ik").items() if "attn_kv_b" not in k}
    _, found = sources(deepseek(age="ik", **V3), shapes)
    assert isinstance(found["model.layers.0.self_attn.kv_b_proj.weight"], JoinedHeads)


def permuted(weight, heads):
    """What llama.cpp's converter does to the rows of a Llama's q and k."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def test_the_rows_of_a_llamas_queries_and_keys_are_put_back():
    torch.manual_seed(0)
    _, found = sources(*FILES["llama"])
    for leaf, source, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        weight = torch.randn(heads * 16, D)
        recipe = found[f"model.layers.1.self_attn.{leaf}.weight"]
        assert recipe.sources == (f"blk.1.{source}.weight",)
        assert torch.equal(recipe.take(permuted(weight, heads)), weight)
        blocks = torch.randint(0, 256, (heads * 16, 36), dtype=torch.uint8)  # Q8_0 or whatever: rows of bytes
        assert torch.equal(recipe.take(permuted(blocks, heads)), blocks)
    assert found["model.layers.1.self_attn.v_proj.weight"] == Rows("blk.1.attn_v.weight", (32, D))


def test_a_llamas_biases_are_put_back_too():
    shapes = grouped_shapes()
    for name, rows in (("attn_q", 64), ("attn_k", 32), ("attn_v", 32), ("attn_output", D)):
        shapes |= {f"blk.{block}.{name}.bias": (rows,) for block in range(2)}
    _, found = sources(grouped(), shapes)
    bias = torch.arange(64.0)
    recipe = found["model.layers.0.self_attn.q_proj.bias"]
    assert torch.equal(recipe.take(permuted(bias[:, None], 4).flatten()), bias)
    assert found["model.layers.0.self_attn.o_proj.bias"] == Rows("blk.0.attn_output.bias", (D,))


@pytest.mark.parametrize("file", ["qwen2", "qwen3"])
def test_rows_of_qwen_stay_where_they_are(file):
    _, found = sources(*FILES[file])
    assert not any(recipe.heads or recipe.start for recipe in found.values())


@pytest.mark.parametrize("fused", [False, True])
def test_experts_are_found_one_by_one_and_whole(fused):
    torch.manual_seed(0)
    count, width = 8, 40
    gate, up, down = torch.randn(count, width, D), torch.randn(count, width, D), torch.randn(count, D, width)
    stored = {"blk.1.ffn_down_exps.weight": down}
    stored |= (
        {"blk.1.ffn_gate_up_exps.weight": torch.cat([gate, up], dim=1)}
        if fused
        else {"blk.1.ffn_gate_exps.weight": gate, "blk.1.ffn_up_exps.weight": up}
    )
    shapes = deepseek_shapes(fused=fused)
    config, found = sources(deepseek(**V3), shapes)
    whole = stacked_experts(config, shapes)
    for leaf, weights in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
        for expert in range(count):
            recipe = found[f"model.layers.1.mlp.experts.{expert}.{leaf}.weight"]
            assert torch.equal(recipe.take(stored[recipe.source]), weights[expert])
        stack = whole[f"model.layers.1.mlp.experts.{leaf}.weight"]
        assert stack.shape == weights.shape
        assert torch.equal(stack.take(stored[stack.source]), weights)
        assert stack.take(stored[stack.source].view(torch.uint8)).shape == (*weights.shape[:2], 4 * weights.shape[2])
    assert {name.split(".")[2] for name in whole} == {"1", "2"}


def test_whole_rows_are_a_view():
    weight = torch.randn(8, 4, 6)
    assert Rows("w", (4, 6), start=8).take(weight).data_ptr() == weight[2].data_ptr()


def test_a_predicting_block_keeps_its_number_and_may_share_the_last_norm():
    metadata, shapes = FILES["predicting"]
    _, found = sources(metadata, shapes)
    assert found["model.layers.3.eh_proj.weight"] == Rows("blk.3.nextn.eh_proj.weight", (D, 2 * D))
    assert found["model.layers.3.shared_head.norm.weight"].source == "blk.3.nextn.shared_head_norm.weight"
    assert "model.layers.3.mlp.experts.7.up_proj.weight" in found
    without = {k: v for k, v in shapes.items() if "shared_head_norm" not in k}
    assert sources(metadata, without)[1]["model.layers.3.shared_head.norm.weight"].source == "output_norm.weight"
    repeated = {"blk.3.nextn.embed_tokens.weight": (VOCAB, D), "blk.3.nextn.shared_head_head.weight": (VOCAB, D)}
    _, more = sources(metadata, shapes | repeated)
    assert {"model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"} <= set(more)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("new", "blk.1.attn_v_b.weight"),
        ("old", "blk.2.attn_kv_b.weight"),
        ("new", "blk.2.exp_probs_b.bias"),
        ("new", "blk.1.ffn_up_exps.weight"),
        ("fused experts", "blk.1.ffn_down_exps.weight"),
        ("llama", "blk.1.ffn_norm.weight"),
        ("qwen2", "blk.0.attn_k.bias"),
        ("predicting", "blk.3.nextn.hnorm.weight"),
        ("minicpm3", "output_norm.weight"),
    ],
)
def test_a_tensor_that_is_missing_or_misshapen_is_named(file, name):
    metadata, shapes = FILES[file]
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        sources(metadata, {k: v for k, v in shapes.items() if k != name})
    with pytest.raises(CheckpointError, match=f"tensor {name} has the shape"):
        sources(metadata, shapes | {name: (*shapes[name][:-1], shapes[name][-1] + 1)})


@pytest.mark.parametrize("file", FILES)
def test_a_tensor_without_a_place_is_named(file):
    metadata, shapes = FILES[file]
    with pytest.raises(CheckpointError, match=r"holds blk\.0\.attn_qkv\.weight \[9, 9\], which its metadata have no"):
        sources(metadata, shapes | {"blk.0.attn_qkv.weight": (9, 9)})


def test_a_softmax_router_has_no_place_for_a_bias():
    metadata, shapes = FILES["old"]
    with pytest.raises(CheckpointError, match=r"blk\.1\.exp_probs_b\.bias"):
        sources(metadata, shapes | {"blk.1.exp_probs_b.bias": (8,)})
