"""A GGUF file's metadata as the config.json of the model that was converted."""

import math

import pytest
from gguf_metadata import (
    VOCAB,
    D,
    H,
    L,
    N,
    R,
    V,
    deepseek,
    deepseek_shapes,
    f32,
    grouped,
    grouped_shapes,
    minicpm3,
    minicpm3_shapes,
    predicting_shapes,
)

from latentkv.checkpoint.gguf.config import ARCHITECTURES, config_of
from latentkv.checkpoint.gguf.metadata import as_written
from latentkv.errors import CheckpointError
from latentkv.models.config_reader import read_config

V3 = {"expert_gating_func": 2, "expert_weights_norm": True, "expert_weights_scale": 2.5}
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 40.0,
    "rope.scaling.original_context_length": 4096,
    "rope.scaling.yarn_log_multiplier": f32(0.1 * 0.707),
}


def differing(config, expected):
    return {key: config.get(key, "absent") for key, value in expected.items() if config.get(key, "absent") != value}


@pytest.mark.parametrize("age", ["new", "old", "ik"])
@pytest.mark.parametrize("q_lora", [48, None])
def test_heads_of_latent_attention_are_the_same_in_files_of_every_age(age, q_lora):
    config = config_of(deepseek(age=age, q_lora=q_lora, **V3), deepseek_shapes(age=age, q_lora=q_lora))
    expected = {
        "model_type": "deepseek_v3",
        "vocab_size": VOCAB,
        "hidden_size": D,
        "num_attention_heads": H,
        "q_lora_rank": q_lora,
        "kv_lora_rank": L,
        "qk_nope_head_dim": N,
        "qk_rope_head_dim": R,
        "v_head_dim": V,
        "rope_interleave": True,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    assert not differing(config, expected)
    read = read_config(config)
    assert (read.attention.kv_lora_rank, read.attention.v_head_dim, read.rope.interleaved) == (L, V, True)


def test_a_query_rank_of_0_means_none():
    shapes = deepseek_shapes(q_lora=None)
    assert config_of(deepseek(q_lora=None, **V3, **{"attention.q_lora_rank": 0}), shapes)["q_lora_rank"] is None


def test_a_sigmoid_router_is_deepseek_v3s():
    groups = {"expert_group_count": 4, "expert_group_used_count": 2}
    config = config_of(deepseek(**V3, **groups), deepseek_shapes())
    expected = {
        "model_type": "deepseek_v3",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 40,
        "first_k_dense_replace": 1,
    }
    assert not differing(config, expected)
    moe = read_config(config).moe
    assert (moe.scoring, moe.correction_bias, moe.group_score, moe.topk_group) == ("sigmoid", True, "top2", 2)


def test_a_softmax_router_is_deepseek_v2s_and_its_groups_count_their_best_expert():
    shapes = deepseek_shapes(sigmoid=False)
    config = config_of(deepseek(expert_group_count=4, expert_group_used_count=2, expert_weights_scale=16.0), shapes)
    assert not differing(
        config,
        {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    )
    moe = read_config(config).moe
    assert (moe.scoring, moe.group_score, moe.normalize_weights, moe.scaling_factor) == ("softmax", "max", False, 16.0)
    lite = config_of(deepseek(q_lora=None), deepseek_shapes(q_lora=None, sigmoid=False))
    assert not differing(lite, {"topk_method": "greedy", "n_group": 1, "routed_scaling_factor": 1.0})


@pytest.mark.parametrize(
    ("experts", "router", "groups"),
    [(256, V3, (8, 4)), (160, {}, (8, 3)), (64, {}, (1, 1)), (384, V3, (1, 1))],
)
def test_files_older_than_the_keys_for_groups_have_those_that_were_published(experts, router, groups):
    shapes = deepseek_shapes(experts=experts, sigmoid=bool(router))
    config = config_of(deepseek(experts=experts, **router), shapes)
    assert (config["n_group"], config["topk_group"]) == groups


def test_softmax_weights_that_sum_to_1_are_mistrals():
    for architecture in ("deepseek2", "mistral4"):
        scaling = YARN | {"rope.scaling.yarn_log_multiplier": f32(0.1), "attention.temperature_scale": f32(0.1)}
        metadata = deepseek(architecture, expert_weights_norm=True, expert_gating_func=1, **scaling)
        config = config_of(metadata, deepseek_shapes(sigmoid=False, fused=True))
        assert not differing(config, {"model_type": "mistral4", "norm_topk_prob": True, "n_group": 1})
        read = read_config(config)
        assert (read.rope.query_scaling_beta, read.rope.mscale_all_dim, read.moe.normalize_weights) == (0.1, 1.0, True)


@pytest.mark.parametrize("blocks", [47, 48])
def test_glm_is_known_by_its_blocks_and_vocabulary_where_the_router_is_not_named(blocks):
    shapes = deepseek_shapes(blocks=3) | {"token_embd.weight": (154880, D)}
    metadata = deepseek(blocks=blocks, vocab_size=154880, expert_weights_norm=True)
    config = config_of(metadata, shapes)
    assert not differing(config, {"model_type": "glm4_moe_lite", "scoring_func": "sigmoid", "norm_topk_prob": True})
    named = metadata | {"deepseek2.expert_gating_func": 2}
    assert config_of(named, shapes)["model_type"] == "glm4_moe_lite"


def test_no_experts_make_it_youtus():
    config = config_of(deepseek(experts=0), deepseek_shapes(experts=0, tied=True))
    assert not differing(config, {"model_type": "youtu", "tie_word_embeddings": True, "intermediate_size": 160})
    read = read_config(config)
    assert read.moe is None
    assert read.rope.interleaved


def test_yarn_is_as_published():
    rope = config_of(deepseek(**V3, **YARN), deepseek_shapes())["rope_parameters"]
    assert rope == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    }
    plain = config_of(deepseek(**V3), deepseek_shapes())["rope_parameters"]
    assert plain == {"rope_type": "default", "rope_theta": 10000.0}


def test_blocks_that_predict_are_counted_apart_only_where_they_are_there():
    counted = deepseek(blocks=4, nextn_predict_layers=1, **V3)
    with_block = deepseek_shapes(blocks=4) | predicting_shapes(3)
    config = config_of(counted, with_block)
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (3, 1)
    left_out = config_of(counted, deepseek_shapes(blocks=3))
    assert (left_out["num_hidden_layers"], left_out["num_nextn_predict_layers"]) == (3, 0)
    uncounted = config_of(deepseek(blocks=3, nextn_predict_layers=1, **V3), deepseek_shapes(blocks=3))
    assert (uncounted["num_hidden_layers"], uncounted["num_nextn_predict_layers"]) == (3, 0)


def test_a_drafter_alone_is_refused():
    drafter = {name: shape for name, shape in deepseek_shapes(blocks=4).items() if not name.startswith("blk.0")}
    with pytest.raises(CheckpointError, match="drafter for another file"):
        config_of(deepseek(blocks=4, nextn_predict_layers=1, **V3), drafter | predicting_shapes(3))


def test_minicpm3_has_the_constants_of_its_only_model_and_its_factors():
    factors = {"rope_factors_long.weight": [1.0, 2.0, 4.0, f32(8.1)], "rope_factors_short.weight": [1.0, 1.0, 1.0, 1.5]}
    config = config_of(minicpm3(), minicpm3_shapes(), factors)
    expected = {
        "model_type": "minicpm3",
        "qk_nope_head_dim": N,
        "v_head_dim": D // H,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
        "tie_word_embeddings": True,
    }
    assert not differing(config, expected)
    read = read_config(config)
    assert (read.rope.kind, read.rope.interleaved) == ("longrope", False)
    assert read.rope.long_factor == (1.0, 2.0, 4.0, 8.1)
    assert read.rope.original_max_positions == 32768


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("head_dim", [16, 32])
def test_grouped_attention_keeps_its_heads(architecture, head_dim):
    metadata = grouped(architecture, head_dim=head_dim)
    config = config_of(metadata, grouped_shapes(architecture, head_dim=head_dim))
    expected = {"model_type": architecture, "head_dim": head_dim, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    assert not differing(config, expected | {"rope_theta": 500000.0, "tie_word_embeddings": True})
    attention = read_config(config).attention
    assert (attention.head_dim, attention.num_kv_heads) == (head_dim, 2)
    assert (attention.qkv_bias, attention.qk_norm) == (architecture == "qwen2", architecture == "qwen3")
    assert all(layer.sliding_window is None for layer in read_config(config).layers)


def test_a_llama_with_a_window_is_a_mistral():
    config = config_of(grouped(**{"attention.sliding_window": 512}), grouped_shapes())
    assert config["model_type"] == "mistral"
    assert [layer.sliding_window for layer in read_config(config).layers] == [512, 512]


def divisors(factor, head_dim=64, theta=500000.0):
    """As llama.cpp's converter works them out for Llama 3 (low 1, high 4, original 8192)."""
    found = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head_dim)
        smooth = min(max((8192 / wavelength - 1) / 3, 0), 1)
        found.append(f32(1 / ((1 - smooth) / factor + smooth)))
    return found


def test_divisors_of_frequencies_are_llama_3s_or_kept_as_they_are():
    metadata, shapes = grouped(head_dim=64), grouped_shapes(head_dim=64) | {"rope_freqs.weight": (32,)}
    rope = config_of(metadata, shapes, {"rope_freqs.weight": divisors(32.0)})["rope_parameters"]
    assert rope == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    other = [1.0 + 0.25 * i for i in range(32)]
    kept = read_config(config_of(metadata, shapes, {"rope_freqs.weight": other})).rope
    assert (kept.kind, kept.short_factor, kept.long_factor, kept.attention_factor) == (
        "longrope",
        tuple(other),
        tuple(other),
        1.0,
    )
    ones = config_of(metadata, shapes, {"rope_freqs.weight": [1.0] * 32})["rope_parameters"]
    assert ones["rope_type"] == "default"


def test_whatever_ends_a_text_is_an_end_and_no_default_is_guessed():
    ends = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 6, "tokenizer.ggml.padding_token_id": 9}
    assert read_config(config_of(grouped() | ends, grouped_shapes())).eos_token_ids == (1, 5, 6)
    silent = {key: value for key, value in grouped().items() if not key.startswith("tokenizer")}
    read = read_config(config_of(silent, grouped_shapes()))
    assert (read.bos_token_id, read.eos_token_ids) == (None, ())
    sentencepiece = read_config(config_of(silent | {"tokenizer.ggml.model": "llama"}, grouped_shapes()))
    assert (sentencepiece.bos_token_id, sentencepiece.eos_token_ids) == (1, (2,))
    none = grouped() | {"tokenizer.ggml.bos_token_id": 2**32 - 1}
    assert read_config(config_of(none, grouped_shapes())).bos_token_id is None


def test_numbers_are_read_as_they_were_written_before_they_became_float32():
    for number in (1e-5, 1e-6, 0.707, 0.0707, 2.5, 1.8, 1e6, 1.0, 0.0, -0.25):
        assert as_written(f32(number)) == number
    assert as_written(1 / 3) == 1 / 3  # stored in float64


def test_one_number_for_each_layer_will_do_where_they_agree():
    assert config_of(grouped(feed_forward_length=[160, 160]), grouped_shapes())["intermediate_size"] == 160
    with pytest.raises(CheckpointError, match=r"llama\.feed_forward_length must be a whole number"):
        config_of(grouped(feed_forward_length=[160, 320]), grouped_shapes())


@pytest.mark.parametrize("architecture", ["glm4moe", "glm-dsa", "deepseek32", "deepseek4", "kimi-linear", "gemma3"])
def test_other_architectures_are_refused_by_name(architecture):
    with pytest.raises(CheckpointError) as refused:
        config_of({"general.architecture": architecture}, {})
    assert repr(architecture) in str(refused.value)
    assert all(name in str(refused.value) for name in ARCHITECTURES)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"deepseek2.block_count": None}, r"lack deepseek2\.block_count"),
        ({"deepseek2.block_count": "27"}, r"deepseek2\.block_count must be a whole number"),
        ({"deepseek2.block_count": True}, r"deepseek2\.block_count must be a whole number"),
        ({"deepseek2.block_count": -3}, r"deepseek2\.block_count must be a whole number"),
        ({"deepseek2.attention.layer_norm_rms_epsilon": math.nan}, r"epsilon must be a finite number"),
        ({"deepseek2.attention.kv_lora_rank": [512, 256]}, r"kv_lora_rank must be a whole number"),
        ({"deepseek2.expert_weights_norm": 1}, r"expert_weights_norm must be true or false"),
        ({"deepseek2.expert_gating_func": 3}, r"expert_gating_func=3 is not supported"),
        ({"deepseek2.attention.key_length_mla": R}, r"none beside 8 rotary ones"),
        ({"deepseek2.rope.scaling.type": "ntk"}, r"rope\.scaling\.type='ntk' is not supported"),
        ({"deepseek2.final_logit_softcapping": 30.0}, r"final_logit_softcapping=30\.0 is not supported"),
        ({"deepseek2.nextn_predict_layers": 3}, r"leaves no model"),
        ({"tokenizer.ggml.eos_token_id": "1"}, r"eos_token_id must be a token id"),
        ({"general.architecture": 7}, r"general\.architecture must be a text"),
        ({"general.architecture": None}, r"lack general\.architecture"),
    ],
)
def test_a_key_that_is_missing_or_wrong_is_named(changed, says):
    metadata = {k: v for k, v in (deepseek(**V3) | changed).items() if v is not None}
    with pytest.raises(CheckpointError, match=says) as refused:
        config_of(metadata, deepseek_shapes())
    assert "\n" not in str(refused.value)


def test_what_yarn_cannot_honour_is_refused_and_what_asks_for_nothing_is_not():
    with pytest.raises(CheckpointError, match=r"attn_factor=0\.5 is not supported"):
        config_of(deepseek(**V3, **YARN, **{"rope.scaling.attn_factor": 0.5}), deepseek_shapes())
    with pytest.raises(CheckpointError, match="temperature_length=8192 is not supported"):
        temperature = {"attention.temperature_scale": 0.5, "attention.temperature_length": 8192}
        config_of(deepseek(**V3, **YARN, **temperature), deepseek_shapes())
    neutral = {"rope.scaling.attn_factor": 1.0, "final_logit_softcapping": 0.0, "attention.causal": True}
    assert config_of(deepseek(**V3, **YARN, **neutral), deepseek_shapes())


def test_llamas_with_experts_or_partial_rotation_are_refused():
    with pytest.raises(CheckpointError, match="8 experts"):
        config_of(grouped(expert_count=8), grouped_shapes())
    with pytest.raises(CheckpointError, match=r"rope\.dimension_count=8 beside heads of 16"):
        config_of(grouped(**{"rope.dimension_count": 8}), grouped_shapes())


def test_a_file_without_an_embedding_is_no_model():
    with pytest.raises(CheckpointError, match=r"no matrix token_embd\.weight"):
        config_of(grouped(), {"mm.0.weight": (4, 4)})
