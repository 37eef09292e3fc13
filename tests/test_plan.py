"""A plan equals what is really built and allocated, and what the models' authors published."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from latentkv.checkpoint import CheckpointReader
from latentkv.checkpoint.names import text_model_names
from latentkv.errors import CacheError, ConfigError, RequestError
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.loading import save_pretrained
from latentkv.models.parameters import tensor_groups
from latentkv.ops import latent_token_bytes
from latentkv.plan import (
    BUILT_IN,
    Memory,
    count_active_parameters,
    count_mtp_parameters,
    count_parameters,
    load_config,
    make_plan,
    weight_bytes,
)
from latentkv.quantize import quantize_checkpoint
from latentkv.sizes import format_bytes, format_count, parse_bytes, parse_tokens
from latentkv.state import PAGE_SIZE, PagedCache

GIB = 2**30
MOE = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
INDEX = {"index_topk": 16, "index_head_dim": 32, "index_n_heads": 2}
COMMON = {
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
SMALL = {
    "deepseek_v2": {**LATENT, **MOE, "q_lora_rank": None, "topk_method": "greedy"},
    "deepseek_v3": {**LATENT, **MOE, "num_nextn_predict_layers": 2, "attention_bias": True},
    "deepseek_v32": {**LATENT, **MOE, **INDEX, "num_nextn_predict_layers": 1},
    "glm_moe_dsa": {**LATENT, **MOE, **INDEX, "index_topk_freq": 2, "num_nextn_predict_layers": 1},
    "kimi_k2": {**LATENT, **MOE, "num_nextn_predict_layers": 0},
    "glm4_moe_lite": {**LATENT, **MOE, "num_nextn_predict_layers": 1},
    "longcat_flash": {
        **LATENT,
        **MOE,
        "n_shared_experts": 0,
        "num_layers": 2,
        "zero_expert_num": 3,
        "attention_bias": True,
    },
    "hy_v4": {
        **LATENT,
        **MOE,
        **INDEX,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "hc_mult": 3,
        "num_nextn_predict_layers": 1,
    },
    "minicpm3": LATENT,
    "youtu": {**LATENT, "tie_word_embeddings": True},
    "mistral4": {**LATENT, **MOE},
    "bailing_hybrid": {**LATENT, **MOE, "layer_group_size": 3, "head_dim": 72, "num_nextn_predict_layers": 1},
    "kimi_linear": {**LATENT, **MOE, "q_lora_rank": None, "layer_types": ["linear_attention", *["full_attention"] * 2]},
    "glm5_next_text": {
        **LATENT,
        **MOE,
        **INDEX,
        "qk_rope_head_dim": 0,
        "layer_types": ["linear_attention", "indexed_attention", "indexed_attention"],
        "indexer_types": ["full", "full", "shared"],
        "linear_num_heads": 2,
        "linear_head_dim": 16,
        "hc_mult": 3,
    },
    "axk1": {**LATENT, **MOE},
    "axk2": {**LATENT, **MOE, **INDEX, "gated_norm_rank": 5},
    "llama": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "mistral": {"num_key_value_heads": 1, "head_dim": 16},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 4, "head_dim": 16, "tie_word_embeddings": True},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "olmoe": {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_key_value_heads": 2, "num_experts": 8, "shared_expert_intermediate_size": 28},
    "qwen3_moe": {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "mlp_only_layers": [1]},
    "dots1": {**MOE, "num_key_value_heads": 2},
    "glm4_moe": {**MOE, "num_key_value_heads": 2, "head_dim": 16, "attention_bias": True, "use_qk_norm": True},
}


def small_config(model_type: str, **changes: object):
    return read_config({"model_type": model_type, **COMMON, **SMALL[model_type], **changes})


def plan_of(name: str, **options):
    return make_plan(name, load_config(name), memory=(Memory("RAM", 64 * GIB, 64 * GIB),), **options)


@pytest.mark.parametrize("model_type", SMALL)
def test_counts_are_those_of_the_decoder(model_type):
    config = small_config(model_type)
    with torch.device("meta"):
        decoder = Decoder(config)
    main, mtp = [], []
    for name, parameter in decoder.named_parameters():
        (mtp if name.startswith("mtp.") else main).append(parameter.numel())
    assert count_parameters(config) == sum(main)
    assert count_mtp_parameters(config) == sum(mtp)


@pytest.mark.parametrize("model_type", SMALL)
def test_weight_bytes_are_those_of_the_decoder_with_its_buffers(model_type):
    config = small_config(model_type, num_nextn_predict_layers=0)
    with torch.device("meta"):
        decoder = Decoder(config)
    tensors = [*decoder.parameters(), *(b for n, b in decoder.named_buffers() if n.endswith("e_score_correction_bias"))]
    assert weight_bytes(config, "fp32") == sum(t.nbytes for t in tensors)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("deepseek-v3", 671e9, 37e9),
        ("deepseek-v3.2", 671.9e9, 37e9),
        ("deepseek-v2", 236e9, 21e9),
        ("deepseek-v2-lite", 15.7e9, 2.4e9),
        ("kimi-k2", 1.03e12, 32e9),
        ("moonlight-16b", 16e9, 2.6e9),
        ("minicpm3-4b", 4.07e9, 4.07e9),
        ("youtu-llm-2b", 1.96e9, 1.96e9),
        ("mixtral-8x7b", 46.7e9, 12.9e9),
        ("ling-3.0-flash", 124e9, 5.1e9),
        ("glm-5.2", 744e9, 40e9),
        ("a.x-k1", 519e9, 32e9),
        ("a.x-k2-light", 20.3e9, 2.24e9),
        ("mistral-small-4", 119e9, 6.1e9),
        ("kimi-k2.5", 1.03e12, 32e9),
        ("longcat-flash", 560e9, 27e9),
    ],
)
def test_published_totals(name, total, active):
    config = load_config(name)
    assert count_parameters(config) == pytest.approx(total, rel=0.005)
    assert count_active_parameters(config) == pytest.approx(active, rel=0.025)


def test_zero_experts_take_part_without_parameters():
    # LongCat-Flash activates 18.6 to 31.3 billion parameters a token, by how many of its 12 choices compute.
    config = load_config("longcat-flash")
    routed = 28 * 3 * 2048 * 6144
    used = count_active_parameters(config)
    assert used - 8 * routed == pytest.approx(18.6e9, rel=0.01)
    assert used + 4 * routed == pytest.approx(31.3e9, rel=0.01)


# Qwen's and Ling-2.6's authors count the whole embedding as active, GLM's neither that nor the output head.
@pytest.mark.parametrize(
    ("name", "total", "active", "embeddings"),
    [
        ("qwen3-30b-a3b", 30.5e9, 3.3e9, 1),
        ("glm-4.5-air", 106e9, 12e9, -1),
        ("kimi-linear-48b", 49e9, 3.1e9, 0),
        ("ling-2.6-flash", 104e9, 7.4e9, 1),
    ],
)
def test_published_totals_that_count_embeddings_otherwise(name, total, active, embeddings):
    config = load_config(name)
    assert count_parameters(config) == pytest.approx(total, rel=0.01)
    counted = count_active_parameters(config) + embeddings * config.vocab_size * config.hidden_size
    assert counted == pytest.approx(active, rel=0.025)


def test_glm_5_3_flash_has_its_published_parameters_with_the_module_that_is_not_run():
    config = load_config("glm-5.3-flash")
    attending = config.layers[43]
    assert attending.indexer is not None
    with_module = count_parameters(replace(config, layers=(*config.layers, attending))) + 2 * config.hidden_size**2
    assert with_module == pytest.approx(321e9, rel=0.005)


def test_deepseek_v3_weighs_what_its_published_files_do():
    # 163 files, 688,586,727,753 bytes with their headers; they repeat embedding and head for the MTP layer, in bf16.
    config = load_config("deepseek-v3")
    mtp = sum(g.count * g.numel for g in tensor_groups(config, mtp=True) if g.kind == "mtp")
    assert 11.4e9 < mtp < 11.7e9
    main = weight_bytes(config, "fp8")
    published = 688_586_727_753
    repeated = 2 * 2 * config.vocab_size * config.hidden_size
    assert main + mtp + repeated == pytest.approx(published, rel=2e-4)


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("deepseek-v2", 69_120),
        ("deepseek-v3", 70_272),
        ("deepseek-v3.2", 70_272 + 15_616),
        ("kimi-k2", 70_272),
        ("kimi-k2.5", 70_272),
        ("glm-5.2", 89_856 + 21 * 256),
        ("a.x-k1", 70_272),
        ("a.x-k2-light", 15_360 + 12_288),
        ("longcat-flash", 64_512),
        ("mistral-small-4", 23_040),
        ("deepseek-v2-lite", 31_104),
        ("moonlight-16b", 31_104),
        ("glm-4.7-flash", 54_144),
        ("minicpm3-4b", 35_712),
        ("youtu-llm-2b", 36_864),
    ],
)
def test_published_shapes_cache_this_many_bytes_a_token(name, bytes_per_token):
    own = plan_of(name).cache[0]
    assert own.this_model and own.attention == "MLA"
    assert (own.bytes_per_token, own.bytes_per_sequence) == (bytes_per_token, 0)


@pytest.mark.parametrize(
    ("name", "bytes_per_token", "layers", "heads"),
    [
        ("ling-3.0-tiny", 6_912, 18, 16),
        ("ling-3.0-flash", 8_064, 35, 32),
        ("kimi-linear-48b", 8_064, 20, 32),
        ("glm-5.3-flash", 11_264 + 11 * 64, 34, 64),
    ],
)
def test_published_hybrids_keep_a_matrix_a_head_and_three_tokens_of_a_convolution_beside(
    name, bytes_per_token, layers, heads
):
    own = plan_of(name).cache[0]
    assert own.attention == "KDA and MLA"
    assert own.bytes_per_token == bytes_per_token
    assert own.bytes_per_sequence == layers * heads * (128 * 128 + 3 * 3 * 128) * 4
    assert count_parameters(load_config("ling-3.0-tiny")) == pytest.approx(7.9e9, rel=0.005)
    config = load_config(name)
    rings = [spec.ring.page_bytes for spec in config.specs("bf16") if spec.ring is not None]  # of pools that are open
    pages = config.max_positions // PAGE_SIZE
    assert own.cache_bytes == pages * (PAGE_SIZE * bytes_per_token + sum(rings)) + own.bytes_per_sequence


def test_lightning_attention_keeps_a_matrix_a_head_and_nothing_else_beside_four_layers_of_latents():
    own = plan_of("ling-2.6-flash").cache[0]
    assert own.attention == "lightning and MLA"
    assert (own.bytes_per_token, own.bytes_per_sequence) == (4 * 576 * 2, 28 * 32 * 128 * 128 * 4)


def test_index_keys_take_132_bytes_in_a_cache_of_8_bits():
    for name, layers in {"deepseek-v3.2": 61, "glm-5.2": 21, "a.x-k2-light": 48}.items():
        dense = latent_token_bytes("int8", load_config(name).attention.kv_lora_rank, load_config(name).rope.dim)
        own = plan_of(name, kv_dtype="int8").cache[0]
        assert own.bytes_per_token == dense * load_config(name).num_layers + 132 * layers


def test_published_gqa_shapes_cache_keys_and_values_of_their_heads():
    heads = {"qwen3-30b-a3b": 48 * 4, "mixtral-8x7b": 32 * 8, "glm-4.5-air": 46 * 8}
    for name, count in heads.items():
        assert plan_of(name).cache[0].bytes_per_token == 2 * 2 * 128 * count


def test_every_built_in_shape_plans():
    assert len(BUILT_IN) == 23
    for name in BUILT_IN:
        assert plan_of(name).context == load_config(name).max_positions


@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8", "int8", "fp32"])
@pytest.mark.parametrize("name", ["minicpm3-4b", "ling-3.0-tiny", "ling-2.6-flash", "glm-5.3-flash"])
def test_the_plan_is_what_the_cache_allocates(name, kv_dtype):
    config = load_config(name)
    own = make_plan("m", config, memory=(), context=100, batch=2, kv_dtype=kv_dtype).cache[0]
    cache = PagedCache(config.specs(kv_dtype), 4, num_slots=2)
    assert (own.bytes_per_token, own.bytes_per_sequence) == (cache.bytes_per_token, cache.sequence_bytes)
    assert own.cache_bytes == cache.allocated_bytes
    if name != "glm-5.3-flash":  # whose pages have rings
        assert own.cache_bytes == 2 * (2 * PAGE_SIZE * own.bytes_per_token + own.bytes_per_sequence)


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_what_drafts_by_mtp_add_is_what_the_cache_allocates_for_them(kv_dtype):
    config = load_config("glm-4.7-flash")
    plan = make_plan("m", config, memory=(), context=100, batch=3, kv_dtype=kv_dtype)
    with_module, without = (PagedCache(config.specs(kv_dtype, mtp=mtp), 6) for mtp in (torch.bfloat16, None))
    assert plan.mtp_cache_bytes == with_module.allocated_bytes - without.allocated_bytes > 0
    assert plan_of("minicpm3-4b").mtp_cache_bytes == 0


def test_the_other_attentions_use_the_same_heads_in_bf16():
    v2 = plan_of("deepseek-v2", kv_dtype="fp8")
    per_head = 60 * (128 + 64 + 128) * 2
    rows = {row.attention: row for row in v2.cache}
    assert rows["MHA"].bytes_per_token == 128 * per_head
    assert rows["GQA, 8 KV heads"].bytes_per_token == 8 * per_head
    assert rows["MQA"].bytes_per_token == per_head
    assert rows["MHA"].ratio_to_mha == 1
    assert rows["MLA"].ratio_to_mha == rows["MLA"].bytes_per_token / (128 * per_head)
    assert rows["MLA"].kv_dtype == "fp8" and rows["MHA"].kv_dtype == "bf16"


def test_a_grouped_query_model_shows_what_it_has():
    config = small_config("llama", num_attention_heads=20, num_key_value_heads=4)
    plan = make_plan("llama", config, memory=())
    assert [row.attention for row in plan.cache] == ["GQA, 4 KV heads", "MHA", "GQA, 8 KV heads", "MQA"]
    assert plan.cache[0].bytes_per_token == 3 * 2 * 4 * 2 * 2
    assert set(plan.kv_dtypes) == {"fp32", "bf16", "fp16"}
    with pytest.raises(CacheError):
        make_plan("llama", config, memory=(), kv_dtype="fp8")


def test_the_longest_context_just_fits():
    config = load_config("youtu-llm-2b")
    weights, memory = weight_bytes(config, "bf16"), Memory("card", 8 * GIB, 8 * GIB)
    plan = make_plan("youtu", config, memory=(memory,), batch=3)
    longest = plan.cache[0].longest_context["card"]
    assert longest % PAGE_SIZE == 0
    for context, fits in ((longest, True), (longest + 1, False)):
        row = make_plan("youtu", config, memory=(memory,), batch=3, context=context).cache[0]
        assert row.fits["card"] is fits
        assert (weights + row.cache_bytes <= memory.free) is fits


def test_no_context_fits_where_the_weights_do_not():
    row = make_plan("v3", load_config("deepseek-v3"), memory=(Memory("RAM", 8 * GIB, 8 * GIB),)).cache[0]
    assert row.longest_context == {"RAM": 0}
    assert row.fits == {"RAM": False}


def test_weights_dtype_is_the_checkpoints_unless_given():
    v3 = load_config("deepseek-v3")
    assert make_plan("v3", v3, memory=()).weights_dtype == "fp8"
    assert make_plan("v3", v3, memory=(), weights_dtype="bf16").weights_bytes == pytest.approx(1.342e12, rel=1e-3)
    assert make_plan("small", small_config("llama", dtype="float32"), memory=()).weights_dtype == "fp32"


@pytest.mark.thin(meet=1)
@pytest.mark.parametrize(("fmt", "group"), [("int8", None), ("int8", 32), ("int4", None), ("int4", 32)])
@pytest.mark.parametrize(
    "model_type",
    [
        "deepseek_v3",
        "deepseek_v32",
        "minicpm3",
        "llama",
        "qwen2_moe",
        "bailing_hybrid",
        "kimi_linear",
        "longcat_flash",
        "hy_v4",
    ],
)
def test_quantised_weights_are_counted_as_their_files_hold_them(tmp_path, model_type, fmt, group):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 256}
    config = small_config(model_type, num_nextn_predict_layers=0, dtype="bfloat16", **sizes)
    save_pretrained(Decoder(config), tmp_path / "source", dtype=torch.bfloat16)
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", fmt, group)
    reader, copy = CheckpointReader(tmp_path / "out"), read_config(tmp_path / "out")
    plan = make_plan("copy", copy, memory=())
    assert plan.weights_dtype == fmt
    # What transformers wants of zero experts is none of the model's.
    known = text_model_names(reader.names).values()
    assert plan.weights_bytes == sum(reader.nbytes(name) for name in known)
    if group is None:
        assert weight_bytes(config, fmt) == plan.weights_bytes


def test_a_foreign_int4_checkpoint_is_counted_by_what_it_leaves_alone():
    # As Kimi-K2-Thinking is published: routed experts in int4, everything else in bf16; about 594 GB in all.
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
    }
    plan = make_plan(
        "k2", read_config({**load_config("kimi-k2").source, "quantization_config": quantization}), memory=()
    )
    assert plan.weights_dtype == "int4"
    assert plan.weights_bytes == pytest.approx(594e9, rel=0.02)


@pytest.mark.parametrize("option", [{"weights_dtype": "int3"}, {"kv_dtype": "fp4"}, {"batch": 0}])
def test_impossible_options_are_refused_by_name(option):
    with pytest.raises((RequestError, ConfigError), match=str(next(iter(option.values())))):
        plan_of("minicpm3-4b", **option)


def test_a_config_is_found_by_file_and_by_folder(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "youtu", **COMMON, **SMALL["youtu"]}))
    assert load_config(str(path)) == load_config(str(tmp_path))


def test_an_unknown_model_names_the_built_in_ones():
    with pytest.raises(ConfigError, match="deepseek-v2-lite"):
        load_config("no-such-model")


@pytest.mark.parametrize(
    ("text", "tokens"), [("128k", 131_072), ("1M", 1_048_576), ("4096", 4096), ("0.5k", 512), (" 2K ", 2048)]
)
def test_token_counts_are_read_as_people_write_them(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "-1", "12 apples", "k", "1e9", "nan"])
def test_other_text_is_no_token_count(text):
    with pytest.raises(RequestError, match="number of tokens"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * GIB), ("24G", 24 * GIB), ("24GB", 24 * 10**9), ("512MiB", 2**29), ("7", 7)]
)
def test_amounts_of_memory_are_read_as_people_write_them(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-3GiB", "0"])
def test_other_text_is_no_amount_of_memory(text):
    with pytest.raises(RequestError, match="amount of memory"):
        parse_bytes(text)


def test_sizes_read_well():
    assert format_bytes(69_120) == "67.50 KiB"
    assert format_bytes(512) == "512 B"
    assert format_count(671e9) == "671B"
    assert format_count(15.7e9) == "15.7B"
    assert format_count(1.03e12) == "1.03T"
