import json
import re

import pytest
import torch
from safetensors.torch import save_file

from latentkv.checkpoint import CheckpointReader, export_names, match_parameters, write_checkpoint
from latentkv.errors import CheckpointError

HIDDEN, EXPERTS, WIDTH, LAYERS = 6, 3, 4, 2


def layer(prefix: str, moe: bool) -> dict[str, tuple[int, ...]]:
    shapes = {f"{prefix}.input_layernorm.weight": (HIDDEN,), f"{prefix}.self_attn.o_proj.weight": (HIDDEN, 8)}
    if not moe:
        return shapes | {f"{prefix}.mlp.down_proj.weight": (HIDDEN, 9)}
    return shapes | {
        f"{prefix}.mlp.gate.weight": (EXPERTS, HIDDEN),
        f"{prefix}.mlp.gate.e_score_correction_bias": (EXPERTS,),
        f"{prefix}.mlp.experts.gate_up_proj": (EXPERTS, 2 * WIDTH, HIDDEN),
        f"{prefix}.mlp.experts.down_proj": (EXPERTS, HIDDEN, WIDTH),
        f"{prefix}.mlp.shared_experts.up_proj.weight": (WIDTH, HIDDEN),
    }


def decoder_state(mtp: int = 0, tied: bool = False, post_norm: bool = False) -> dict[str, torch.Tensor]:
    """Tensors that a decoder of a dense and a MoE layer would hold, all different and none zero."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (11, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes |= layer("model.layers.0", moe=False) | layer("model.layers.1", moe=True)
    if post_norm:
        shapes["model.layers.1.mlp.post_mlp_layernorm.weight"] = (HIDDEN,)
    if not tied:
        shapes["lm_head.weight"] = (11, HIDDEN)
    for k in range(mtp):
        shapes |= {f"mtp.{k}.{norm}.weight": (HIDDEN,) for norm in ("enorm", "hnorm", "norm")}
        shapes |= {f"mtp.{k}.eh_proj.weight": (HIDDEN, 2 * HIDDEN)} | layer(f"mtp.{k}.layer", moe=True)
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) + 2 for name, shape in shapes.items()}


def published(state: dict[str, torch.Tensor], **options) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in export_names(state, num_layers=LAYERS, **options)}


def filled_from(tensors, state, folder, **options):
    """Fill NaN-filled copies of `state` from a checkpoint of `tensors`."""
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    target = {name: torch.full_like(t, float("nan")) for name, t in state.items()}
    return target, fill(target, folder, **options)


def fill(target, folder, **options):
    """Fill `target` in place; returns which MTP modules were found."""
    match = match_parameters(target, CheckpointReader(folder), num_layers=LAYERS, **options)
    match.fill(
        {name: t for name, t in target.items() if not name.startswith("mtp.") or int(name[4]) in match.mtp_modules}
    )
    return match.mtp_modules


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_published_names_are_per_expert_and_count_mtp_layers_after_the_model():
    names = set(published(decoder_state(mtp=2, post_norm=True)))
    assert {
        "model.layers.1.mlp.experts.0.gate_proj.weight",
        "model.layers.1.mlp.experts.2.up_proj.weight",
        "model.layers.1.mlp.experts.2.down_proj.weight",
        "model.layers.1.post_mlp_layernorm.weight",
        "model.layers.2.enorm.weight",
        "model.layers.2.shared_head.norm.weight",
        "model.layers.3.eh_proj.weight",
        "model.layers.3.mlp.experts.1.down_proj.weight",
        "model.layers.3.mlp.gate.e_score_correction_bias",
    } <= names
    assert not any("gate_up_proj" in name or name.startswith("mtp.") for name in names)


def test_gate_rows_come_before_up_rows():
    state = decoder_state()
    fused, parts = state["model.layers.1.mlp.experts.gate_up_proj"], published(state)
    assert torch.equal(parts["model.layers.1.mlp.experts.1.gate_proj.weight"], fused[1, :WIDTH])
    assert torch.equal(parts["model.layers.1.mlp.experts.1.up_proj.weight"], fused[1, WIDTH:])


@pytest.mark.parametrize("experts", ["one by one", "fused", "mixtral"])
@pytest.mark.parametrize("mtp", [0, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_exported_fills_the_same_decoder(tmp_path, experts, mtp, tied):
    state = decoder_state(mtp=mtp, tied=tied, post_norm=True)
    target, found = filled_from(published(state, experts=experts), state, tmp_path, num_mtp_layers=mtp)
    assert_same(target, state)
    assert found == set(range(mtp))


def test_a_round_trip_through_small_shards(tmp_path):
    state = decoder_state(mtp=1)
    tensors = export_names(state, num_layers=LAYERS)
    write_checkpoint(tmp_path, tensors, {"model_type": "x"}, max_shard_bytes=500)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    target = {name: torch.full_like(t, float("nan")) for name, t in state.items()}
    assert fill(target, tmp_path, num_mtp_layers=1) == {0}
    assert_same(target, state)


def test_weights_are_cast_to_the_dtype_of_each_target_and_parameters_keep_their_identity(tmp_path):
    state = decoder_state()
    save_file(
        {n: t.to(torch.bfloat16).contiguous() for n, t in published(state).items()}, tmp_path / "model.safetensors"
    )
    target = {name: torch.nn.Parameter(torch.empty_like(t)) for name, t in state.items()}
    target["model.norm.weight"] = torch.nn.Parameter(torch.empty(HIDDEN, dtype=torch.float64))
    before = {name: t.data_ptr() for name, t in target.items()}
    fill(target, tmp_path)
    for name, tensor in target.items():
        assert tensor.data_ptr() == before[name]
        assert torch.equal(tensor, state[name].to(torch.bfloat16).to(tensor.dtype)), name


def test_an_absent_mtp_layer_is_reported_not_an_error(tmp_path):
    state = decoder_state(mtp=2)
    tensors = {n: t for n, t in published(state).items() if not n.startswith("model.layers.3.")}
    target, found = filled_from(tensors, state, tmp_path, num_mtp_layers=2)
    assert found == {0}
    assert torch.equal(target["mtp.0.eh_proj.weight"], state["mtp.0.eh_proj.weight"])
    assert target["mtp.1.eh_proj.weight"].isnan().all()


def test_half_an_mtp_layer_is_an_error(tmp_path):
    state = decoder_state(mtp=1)
    tensors = published(state)
    del tensors["model.layers.2.eh_proj.weight"]
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.2\.eh_proj\.weight \[6, 12\]"):
        filled_from(tensors, state, tmp_path, num_mtp_layers=1)


@pytest.mark.parametrize("counted", [0, 1])
def test_mtp_layers_that_nobody_asked_for_are_left_unread(tmp_path, counted):
    tensors = published(decoder_state(mtp=1))
    state = {name: t for name, t in decoder_state(mtp=1).items() if not name.startswith("mtp.")}
    target, found = filled_from(tensors, state, tmp_path, num_mtp_layers=counted)
    assert_same(target, state)
    assert found == set()


def test_the_embedding_and_head_repeated_in_an_mtp_layer_are_left_out(tmp_path):
    state = decoder_state(mtp=1)
    copies = {
        "model.layers.2.embed_tokens.weight": state["model.embed_tokens.weight"],
        "model.layers.2.shared_head.head.weight": state["lm_head.weight"],
    }
    target, found = filled_from(published(state) | copies, state, tmp_path, num_mtp_layers=1)
    assert_same(target, state)
    assert found == {0}


def test_a_tied_head_may_be_present_as_a_copy(tmp_path):
    state = decoder_state(tied=True)
    copy = {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    target, _ = filled_from(published(state) | copy, state, tmp_path)
    assert_same(target, state)


@pytest.mark.parametrize("rows", [11, 12])
def test_a_head_of_its_own_is_not_dropped_because_the_config_ties_it(tmp_path, rows):
    state = decoder_state(tied=True)
    with pytest.raises(CheckpointError, match="tie_word_embeddings to false"):
        filled_from(published(state) | {"lm_head.weight": torch.ones(rows, HIDDEN)}, state, tmp_path)


def test_an_untied_head_may_not_be_absent(tmp_path):
    tensors = published(decoder_state(tied=True))
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight \[11, 6\]"):
        filled_from(tensors, decoder_state(), tmp_path)


@pytest.mark.parametrize("place", [".", ".mlp."])
def test_the_post_mlp_norm_is_found_at_the_layer_or_in_the_mlp_and_ignored_on_dense_layers(tmp_path, place):
    state = decoder_state(post_norm=True)
    tensors = published(state)
    norm = tensors.pop("model.layers.1.post_mlp_layernorm.weight")
    tensors[f"model.layers.1{place}post_mlp_layernorm.weight"] = norm
    tensors[f"model.layers.0{place}post_mlp_layernorm.weight"] = torch.ones(HIDDEN)
    assert_same(filled_from(tensors, state, tmp_path)[0], state)


def test_a_post_mlp_norm_is_unexpected_in_a_model_that_has_none(tmp_path):
    state = decoder_state()
    tensors = published(state) | {"model.layers.0.post_mlp_layernorm.weight": torch.ones(HIDDEN)}
    with pytest.raises(CheckpointError, match="post_mlp_layernorm"):
        filled_from(tensors, state, tmp_path)


def test_an_absent_correction_bias_is_zero_only_when_that_is_allowed(tmp_path):
    state = decoder_state()
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors = {n: t for n, t in published(state).items() if n != name}
    with pytest.raises(CheckpointError, match=re.escape(name)):
        filled_from(tensors, state, tmp_path)
    target, _ = filled_from(tensors, state, tmp_path, zero_if_absent=("e_score_correction_bias",))
    assert target[name].tolist() == [0, 0, 0]


@pytest.mark.parametrize("style", ["published", "transformers 5"])
def test_a_text_model_inside_a_vision_wrapper_is_found(tmp_path, style):
    state = decoder_state()
    if style == "published":
        tensors = {f"language_model.{n}": t for n, t in published(state).items()}
        tensors |= {"vision_tower.blocks.0.weight": torch.ones(2), "mm_projector.proj.weight": torch.ones(2)}
    else:
        tensors = {re.sub(r"^model\.", "model.language_model.", n): t for n, t in published(state).items()}
        tensors |= {"model.vision_tower.x.weight": torch.ones(2), "model.multi_modal_projector.y": torch.ones(2)}
    assert_same(filled_from(tensors, state, tmp_path)[0], state)


@pytest.mark.parametrize("extra", ["vision_tower.blocks.0.weight", "model.layers.0.self_attn.q_proj.bias", "other"])
def test_unexpected_tensors_are_named(tmp_path, extra):
    state = decoder_state()
    with pytest.raises(
        CheckpointError, match=rf"holds {re.escape(extra)} \[2\], which its config\.json has no place for"
    ):
        filled_from(published(state) | {extra: torch.ones(2)}, state, tmp_path)


def test_layers_and_experts_beyond_the_config_are_unexpected(tmp_path):
    state = decoder_state()
    for extra in ("model.layers.2.input_layernorm.weight", "model.layers.1.mlp.experts.3.up_proj.weight"):
        with pytest.raises(CheckpointError, match=re.escape(extra)):
            filled_from(published(state) | {extra: torch.ones(2)}, state, tmp_path)


def test_rotary_frequencies_are_ignored(tmp_path):
    state = decoder_state()
    tensors = published(state) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    assert_same(filled_from(tensors, state, tmp_path)[0], state)


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", "model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.0.self_attn.o_proj.weight"],
)
def test_a_missing_tensor_is_named_with_its_shape_and_nothing_is_touched(tmp_path, name):
    state = decoder_state()
    tensors = published(state)
    shape = list(tensors.pop(name).shape)
    save_file(tensors, tmp_path / "model.safetensors")
    target = {n: torch.zeros_like(t) for n, t in state.items()}
    with pytest.raises(CheckpointError, match=re.escape(f"lacks {name} {shape}")):
        fill(target, tmp_path)
    assert not any(t.any() for t in target.values())


def test_many_missing_tensors_are_counted(tmp_path):
    with pytest.raises(CheckpointError, match=r"and \d+ more"):
        filled_from({"model.norm.weight": torch.ones(HIDDEN)}, decoder_state(), tmp_path)


@pytest.mark.parametrize("experts", ["one by one", "fused", "mixtral"])
def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path, experts):
    state = decoder_state()
    tensors = published(state, experts=experts)
    layer, names = "model.layers.1", {"fused": "mlp.experts.down_proj", "one by one": "mlp.experts.1.down_proj.weight"}
    name = f"{layer}.{names.get(experts, 'block_sparse_moe.experts.1.w2.weight')}"
    right = list(tensors[name].shape)
    tensors[name] = torch.ones(5, 7)
    message = f"{name} (expected {right}, found [5, 7])"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        filled_from(tensors, state, tmp_path)


def test_integers_are_no_weights(tmp_path):
    state = decoder_state()
    tensors = published(state) | {"model.norm.weight": torch.ones(HIDDEN, dtype=torch.int8)}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight \(expected floating point, found int8\)"):
        filled_from(tensors, state, tmp_path)


def test_float8_experts_are_dequantised_into_their_place(tmp_path):
    state = decoder_state()
    tensors = published(state)
    name, block = "model.layers.1.mlp.experts.2.up_proj.weight", 4
    weight, scale = tensors[name].to(torch.float8_e4m3fn), torch.tensor([[0.5, 2.0]])
    tensors |= {name: weight, f"{name}_scale_inv": scale}
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [block, block]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    target, _ = filled_from(tensors, state, tmp_path)
    expected = weight.float() * torch.tensor([0.5] * 4 + [2.0] * 2)
    assert torch.equal(target["model.layers.1.mlp.experts.gate_up_proj"][2, WIDTH:], expected)
