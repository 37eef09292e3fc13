"""config.json: both styles mean the same, absent keys mean the family's defaults, what is not supported is refused."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from latentkv.errors import ConfigError
from latentkv.models.config import GQAConfig, HyperConnectionConfig, KDAConfig, MLAConfig
from latentkv.models.config_reader import read_config
from latentkv.models.families import FAMILIES
from latentkv.ops import SwigluLimit

V2_LITE = {  # in the style of DeepSeek-V2-Lite's published config.json, transcribed
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 102400,
}


def test_published_and_transformers_5_files_mean_the_same(tmp_path: Path) -> None:
    # A copy: transformers writes its own keys into the dict that it is given.
    AutoConfig.for_model(**deepcopy(V2_LITE)).save_pretrained(tmp_path)
    rewritten = read_config(tmp_path)
    assert "rope_scaling" not in json.loads((tmp_path / "config.json").read_text())
    assert read_config(V2_LITE) == rewritten


def test_the_latents_norms_have_an_eps_of_their_own() -> None:
    for change, expected in (({}, 1e-6), ({"rms_norm_eps": 1e-5}, 1e-6), ({"latent_norm_eps": 1e-5}, 1e-5)):
        attention = read_config(V2_LITE | change).attention
        assert isinstance(attention, MLAConfig) and attention.latent_norm_eps == expected


def test_v2_lite_reads_as_its_shape_is_published() -> None:
    config = read_config(V2_LITE)
    assert config.attention == MLAConfig(512, 128, 64, 128, None)
    assert config.moe is not None
    assert (config.moe.num_experts, config.moe.experts_per_token, config.moe.num_shared_experts) == (64, 6, 2)
    assert [layer.moe is not None for layer in config.layers] == [False, *[True] * 26]
    assert config.rope.interleaved
    assert (config.rope.kind, config.rope.factor) == ("yarn", 40.0)
    # (0.0707 ln 40 + 1)^2, as DeepSeek-V2's own code scales the softmax
    assert config.rope.softmax_factor == pytest.approx(1.589618, abs=1e-5)
    assert config.eos_token_ids == (100001,)


DEFAULTED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "bos_token_id": "bos_token_id",
}


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - {"kimi_k2", "sarvam_mla"}))
def test_an_absent_key_takes_the_default_of_transformers(model_type: str) -> None:
    v2 = {"num_experts_per_tok": 6}
    needed = {"deepseek_v2": v2, "deepseek_ocr2_text": v2, "glm4_moe": {"head_dim": 128}}.get(model_type, {})
    theirs = AutoConfig.for_model(model_type, **needed)
    ours = read_config({"model_type": model_type, **needed})
    for their_name, our_name in DEFAULTED.items():
        assert getattr(ours, our_name) == getattr(theirs, their_name), their_name
    eos = theirs.eos_token_id
    assert ours.eos_token_ids == (() if eos is None else (eos,))
    rope = getattr(theirs, "rope_parameters", {"rope_theta": ours.rope.theta, "rope_type": "none"})
    assert (ours.rope.theta, ours.rope.kind) == (rope["rope_theta"], rope["rope_type"])
    attention = ours.cached_attention
    if isinstance(attention, MLAConfig):
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank"):
            assert getattr(attention, name) == getattr(theirs, name, None), name
    else:
        assert attention.num_kv_heads == theirs.num_key_value_heads
        assert attention.head_dim == (
            getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
        )
    if ours.moe is not None:
        experts = "n_routed_experts" if hasattr(theirs, "n_routed_experts") else "num_experts"
        assert ours.moe.num_experts == getattr(theirs, experts)
        assert ours.moe.experts_per_token == theirs.num_experts_per_tok
        assert ours.moe.num_shared_experts == getattr(theirs, "n_shared_experts", 0)
        assert ours.moe.gated_shared_size == getattr(theirs, "shared_expert_intermediate_size", 0)
        assert ours.moe.intermediate_size == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
        assert ours.moe.scaling_factor == getattr(theirs, "routed_scaling_factor", 1.0)
        assert ours.moe.normalize_weights == getattr(theirs, "norm_topk_prob", model_type == "mixtral")
        kinds = getattr(theirs, "mlp_layer_types", None)
        first = getattr(theirs, "first_k_dense_replace", int(model_type == "deepseek_ocr2_text"))
        sparse = [k == "sparse" for k in kinds] if kinds else [i >= first for i in range(ours.num_layers)]
        if model_type == "longcat_flash":  # each of its layers is two
            sparse = [False, True] * theirs.num_layers
            assert ours.moe.num_zero_experts == theirs.zero_expert_num
        assert [layer.moe is not None for layer in ours.layers] == sparse
    recurrent = [layer.attention for layer in ours.layers if isinstance(layer.attention, KDAConfig)]
    for kda in recurrent:
        assert (kda.num_heads, kda.head_dim) == (theirs.linear_num_heads, theirs.linear_head_dim)
        assert kda.norm_eps == theirs.rms_norm_eps
        bound = "linear_lower_bound" if model_type == "glm5_next_text" else "kda_lower_bound"
        assert kda.lower_bound == getattr(theirs, bound, None)
    if recurrent:
        attends = [layer.rope is not None for layer in ours.layers]
        assert attends == [kind != "linear_attention" for kind in theirs.layer_types]
    for indexer in (layer.indexer for layer in ours.layers if layer.indexer is not None):
        assert (indexer.num_heads, indexer.head_dim) == (theirs.index_n_heads, theirs.index_head_dim)
        assert (indexer.topk, indexer.pool) == (theirs.index_topk, getattr(theirs, "index_kpool", None))
        assert indexer.open_pool == getattr(theirs, "index_kpool_always_select_tail", True)
    streams = ours.hyper_connections
    assert (streams is None) == (not hasattr(theirs, "hc_mult"))
    if streams is not None:
        assert (streams.num_streams, streams.eps) == (theirs.hc_mult, theirs.hc_eps)
        if isinstance(streams, HyperConnectionConfig):
            assert streams.sinkhorn_iterations == theirs.hc_sinkhorn_iters
        else:
            assert streams.magnitude == theirs.hc_magnitude
        limit = SwigluLimit(theirs.swiglu_limit, bounds_gate=True)
        everywhere = None if model_type == "hy_v4" else limit  # there of routed experts alone
        assert ours.moe is not None and ours.layers[-1].moe is not None
        limits = ours.layers[-1].moe.swiglu_limit, ours.layers[-1].moe.shared_swiglu_limit
        assert (*limits, ours.swiglu_limit) == (limit, everywhere, everywhere)


def test_a_text_model_inside_a_wrapper_is_read() -> None:
    wrapped = {"model_type": "mistral3", "text_config": V2_LITE, "eos_token_id": [7, 100001]}
    config = read_config(wrapped)
    assert config.attention == read_config(V2_LITE).attention
    assert config.eos_token_ids == (100001, 7)


def test_stop_ids_are_the_union_of_config_and_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(V2_LITE))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [100001, 5]}))
    assert read_config(tmp_path).eos_token_ids == (100001, 5)


def test_other_names_of_a_model_type_are_understood() -> None:
    assert read_config({"model_type": "AXK1"}) == read_config({"model_type": "axk1"})


def test_rope_parameters_that_are_null_take_the_default_of_the_family() -> None:
    assert read_config({"model_type": "mistral4", "rope_parameters": None}) == read_config({"model_type": "mistral4"})


def test_mistral_slides_in_every_layer_and_qwen_only_where_told() -> None:
    def windows(change: dict[str, object]) -> list[int | None]:
        return [layer.sliding_window for layer in read_config({"num_hidden_layers": 3} | change).layers]

    assert windows({"model_type": "mistral"}) == [4096, 4096, 4096]
    assert windows({"model_type": "mistral", "sliding_window": None}) == [None, None, None]
    qwen = {"model_type": "qwen2", "max_window_layers": 2}
    assert windows(qwen) == [None, None, None]
    assert windows(qwen | {"use_sliding_window": True}) == [None, None, 4096]


def test_what_layers_differ_in_cannot_be_asked_of_the_model() -> None:
    config = read_config(V2_LITE)
    other = replace(config.layers[-1], attention=MLAConfig(256, 128, 64, 128), rope=replace(config.rope, theta=5e5))
    mixed = replace(config, layers=(*config.layers[:-1], other))
    assert mixed.moe == config.moe and mixed.mtp_layer == other
    with pytest.raises(ConfigError, match="deepseek_v2 model differ in their attention"):
        _ = mixed.attention
    with pytest.raises(ConfigError, match="deepseek_v2 model differ in their rotary embedding"):
        _ = mixed.rope


def test_which_layers_of_models_with_experts_slide() -> None:
    told = {"num_hidden_layers": 4, "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 3}
    slide = {"mixtral": (9, 9, 9, 9), "qwen3_moe": (9, 9, 9, 9), "qwen2_moe": (9, None, 9, None)}
    slide |= {"dots1": (None, None, None, 9)}
    for model_type, windows in slide.items():
        layers = read_config(told | {"model_type": model_type}).layers
        assert tuple(layer.sliding_window for layer in layers) == windows, model_type


def test_which_layers_have_experts_as_qwen_says_it() -> None:
    def sparse(**said: object) -> tuple[bool, ...]:
        layers = read_config({"model_type": "qwen3_moe", "num_hidden_layers": 4} | said).layers
        return tuple(layer.moe is not None for layer in layers)

    assert sparse() == (True, True, True, True)
    assert sparse(decoder_sparse_step=2) == (False, True, False, True)
    assert sparse(decoder_sparse_step=2, mlp_only_layers=[3]) == (False, True, False, False)


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("olmoe", {"clip_qkv": 8.0}),
        ("llama", {"attention_multiplier": 0.1}),
        ("qwen2", {"logits_scaling": 8.0}),
        ("qwen2_moe", {"mlp_only_layers": 1}),
        ("qwen2_moe", {"mlp_only_layers": ["1"]}),
        ("qwen3_moe", {"decoder_sparse_step": -1}),
        ("qwen3_moe", {"scoring_func": "sigmoid"}),
        ("qwen3_moe", {"partial_rotary_factor": 0.5}),
        ("dots1", {"n_routed_experts": 8, "num_experts_per_tok": 2, "scoring_func": "softmax"}),
        ("glm4_moe", {"partial_rotary_factor": 1.5}),
        ("glm4_moe", {"use_qk_norm": "yes"}),
    ],
)
def test_what_a_model_with_experts_cannot_have_is_refused_by_name(model_type: str, change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=[*change][-1]):
        read_config({"model_type": model_type} | change)


def test_mqa_and_mha_follow_from_the_key_value_heads() -> None:
    mqa = read_config({"model_type": "llama", "num_key_value_heads": 1})
    mha = read_config({"model_type": "llama"})
    assert isinstance(mqa.attention, GQAConfig)
    assert isinstance(mha.attention, GQAConfig)
    assert (mqa.attention.num_kv_heads, mha.attention.num_kv_heads) == (1, 32)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "2048"}, "hidden_size"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok"),
        ({"topk_method": "noaux_tc"}, "topk_method"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"norm_topk_prob": True}, "norm_topk_prob"),
        ({"index_topk": 2048}, "index_topk"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"quantization_config": {"quant_method": "exl2"}}, "EXL2"),
        ({"rope_scaling": {"type": "proportional", "factor": 2.0}}, "proportional"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "short_factor"),
        ({"partial_rotary_factor": 0.4}, "partial_rotary_factor"),
        ({"qk_rope_head_dim": 63}, "63"),
        ({"topk_method": "group_limited_greedy", "n_group": 5, "topk_group": 2}, "experts"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"latent_norm_eps": "small"}, "latent_norm_eps"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_config(V2_LITE | change)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": ["yarn"]},
        {"rope_scaling": {"type": "yarn", "factor": "forty"}},
        {"rope_theta": None},
        {"first_k_dense_replace": [1]},
        {"quantization_config": ["fp8"]},
    ],
)
def test_a_value_of_the_wrong_kind_is_one_sentence(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"config\.json.* (holds a value of the wrong kind|must be)"):
        read_config(V2_LITE | change)


def test_the_quantisation_of_a_wrapper_is_seen() -> None:
    with pytest.raises(ConfigError, match="by HQQ"):
        read_config({"text_config": V2_LITE, "quantization_config": {"quant_method": "hqq"}})


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_damaged_config_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "not True"),
        ("2", "not '2'"),
        (2.0, r"not 2\.0"),
        ([[2]], "not a list"),
        ({"id": 2}, "whole number"),
        (-2, "the token -2, outside"),
        (102400, "the token 102400, outside the vocabulary of 0 to 102399"),
    ],
)
def test_a_token_id_that_is_none_is_named(tmp_path: Path, file: str, key: str, value: object, message: str) -> None:
    files = {"config.json": dict(V2_LITE), "generation_config.json": {}}
    files[file][key] = value
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    if key == "pad_token_id" and value == 102400:
        read_config(tmp_path)  # padding is never looked up
        return
    with pytest.raises(ConfigError, match=rf"^{file}: {key} .*{message}"):
        read_config(tmp_path)


def test_minus_one_and_null_name_no_token(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(V2_LITE | {"bos_token_id": -1, "pad_token_id": -1}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [-1, 7], "bos_token_id": None}))
    config = read_config(tmp_path)
    assert config.bos_token_id is None
    assert config.eos_token_ids == (100001, 7)


def test_a_familys_default_outside_a_smaller_vocabulary_is_not_meant() -> None:
    small = {key: value for key, value in V2_LITE.items() if not key.endswith("token_id")} | {"vocab_size": 1}
    config = read_config(small)
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())
