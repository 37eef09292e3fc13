"""Names of a text model: what stands before them is found, and whose tensors are beside it."""

import pytest

from latentkv.checkpoint.hy_names import as_hy
from latentkv.checkpoint.names import text_model_names
from latentkv.checkpoint.paired_names import as_paired
from latentkv.errors import CheckpointError

PUBLISHED = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.experts.0.up_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
]


def renamed(prefix, head=None):
    head = prefix.removesuffix("model.") if head is None else head
    return {name: prefix + name[6:] if name.startswith("model.") else head + name for name in PUBLISHED}


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("model.", ""),
        ("", ""),
        ("transformer.", ""),
        ("transformer.", None),
        ("base_model.model.model.", None),
        ("module.model.", None),
        ("_orig_mod.model.", None),
        ("module._orig_mod.model.", None),
        ("model._fsdp_wrapped_module.", ""),
        ("student.model.", None),
        ("language_model.model.", None),
        ("model.language_model.", ""),
        ("model.text_model.", ""),
        ("thinker.model.", None),
        ("llm.model.", None),
    ],
)
def test_a_prefix_is_found_and_not_listed(prefix, head):
    stored = renamed(prefix, head)
    assert text_model_names(stored.values()) == stored


def test_wrappers_in_the_middle_of_names_are_taken_off():
    stored = {name: name.replace("self_attn", "_orig_mod.self_attn") for name in PUBLISHED}
    assert text_model_names(stored.values()) == stored


@pytest.mark.parametrize(
    ("prefix", "others"),
    [
        ("language.model.", ["vision.blocks.0.x", "projector.layers.0.weight", "image_newline", "view_seperator"]),
        ("model.", ["model.sam_model.blocks.0.x", "model.vision_model.layers.0.self_attn.q_proj.weight"]),
        ("model.", ["model.projector.layers.weight", "model.image_newline", "visual.layers.0.norm.weight"]),
        ("thinker.model.", ["talker.model.layers.0.x", "talker.model.embed_tokens.weight", "talker.lm_head.weight"]),
        ("", ["vision_tower.encoder.layers.0.x", "vision_tower.norm.weight"]),
    ],
)
def test_other_models_beside_the_text_model_are_left_out_of_a_wrapper(prefix, others):
    stored = renamed(prefix)
    assert text_model_names([*stored.values(), *others], nested=True) == stored


def test_without_a_wrapper_what_is_beside_the_model_is_no_part_of_it_and_stays():
    for prefix in ("model.", "base_model.model.model."):
        found = text_model_names([*renamed(prefix).values(), "stray.weight", f"{prefix}stray.weight"])
        assert found["stray.weight"] == "stray.weight"
        assert found["model.stray.weight"] == f"{prefix}stray.weight"


def test_a_tied_head_stored_alone_is_the_embedding():
    names = [name for name in PUBLISHED if "embed_tokens" not in name]
    assert text_model_names(names, tied=True)["model.embed_tokens.weight"] == "lm_head.weight"
    assert "model.embed_tokens.weight" not in text_model_names(names)


def test_two_tensors_of_the_same_meaning_are_refused():
    both = [*PUBLISHED, "model.layers.0._orig_mod.self_attn.q_proj.weight"]
    with pytest.raises(CheckpointError, match=r"are both model\.layers\.0\.self_attn\.q_proj\.weight: remove one"):
        text_model_names(both)


def test_names_of_ling_3_mean_what_everybodys_do():
    published = {
        "model.word_embeddings.weight": "model.embed_tokens.weight",
        "model.layers.0.attention.q_conv1d.weight": "model.layers.0.self_attn.q_conv1d.weight",
        "model.layers.0.attention.o_proj.weight": "model.layers.0.self_attn.o_proj.weight",
        "model.layers.1.attention.dense.weight": "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.attention.g_proj.weight": "model.layers.1.self_attn.g_proj.weight",
        "model.layers.1.mlp.gate.expert_bias": "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.2.final_layernorm.weight": "model.layers.2.shared_head.norm.weight",
        "model.norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    assert text_model_names(published) == {known: name for name, known in published.items()}


def test_a_layer_of_longcat_flash_is_two():
    published = {
        "model.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.3.input_layernorm.0.weight": "model.layers.6.input_layernorm.weight",
        "model.layers.3.self_attn.0.q_a_proj.weight": "model.layers.6.self_attn.q_a_proj.weight",
        "model.layers.3.self_attn.1.q_a_proj.bias": "model.layers.7.self_attn.q_a_proj.bias",
        "model.layers.3.post_attention_layernorm.1.weight": "model.layers.7.post_attention_layernorm.weight",
        "model.layers.3.mlps.0.up_proj.weight": "model.layers.6.mlp.up_proj.weight",
        "model.layers.3.mlps.1.down_proj.weight": "model.layers.7.mlp.down_proj.weight",
        "model.layers.3.mlp.router.classifier.weight": "model.layers.7.mlp.gate.weight",
        "model.layers.3.mlp.router.e_score_correction_bias": "model.layers.7.mlp.gate.e_score_correction_bias",
        "model.layers.3.mlp.experts.12.gate_proj.weight": "model.layers.7.mlp.experts.12.gate_proj.weight",
        "model.layers.3.mlp.experts.12.down_proj.weight": "model.layers.7.mlp.experts.12.down_proj.weight",
        "model.norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    ignored = [
        "model.layers.3.mlp.experts.13.gate_proj.weight",
        "model.layers.3.mlp.experts.13.up_proj.weight",
        "model.mtp.layers.0.self_attn.0.q_a_proj.weight",
        "model.mtp.norm.weight",
    ]
    assert text_model_names([*ignored, *published]) == {known: name for name, known in published.items()}
    assert {name: as_paired(known) for name, known in published.items()} == {name: name for name in published}
    outer = {f"base_model.{name}" if "model." in name else name: known for name, known in published.items()}
    assert text_model_names(outer) == {known: name for name, known in outer.items()}


def test_without_pairs_experts_without_an_end_are_experts():
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.experts.3.up_proj.weight", "model.mtp.x"]
    assert list(text_model_names(names)) == names


def test_dense_and_shared_blocks_of_kimi_linear_may_be_called_as_transformers_writes_them():
    for block in ("mlp", "block_sparse_moe"):
        stored = f"model.layers.0.{block}.gate_proj.weight", f"model.layers.1.{block}.shared_experts.up_proj.weight"
        names = text_model_names([*stored, "model.layers.1.block_sparse_moe.experts.3.w2.weight"])
        assert list(names) == [
            "model.layers.0.mlp.gate_proj.weight",
            "model.layers.1.mlp.shared_experts.up_proj.weight",
            "model.layers.1.mlp.experts.3.down_proj.weight",
        ]


def test_what_hy4_calls_otherwise_is_called_as_everybody_elses():
    published = {
        "model.embed_tokens.weight": "model.embed_tokens.weight",
        "model.hc_pre.hc_head.hc_head_base": "model.hc_head.base",
        "model.layers.1.hc_pre.hc_attn_layer.hc_fn": "model.layers.1.hc_attn_fn",
        "model.layers.1.hc_pre.hc_mlp_layer.hc_scale": "model.layers.1.hc_ffn_scale",
        "model.layers.1.mlp.experts.gate_up_proj": "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.shared_experts.gate_proj.weight": "model.layers.1.mlp.shared_experts.gate_proj.weight",
        "model.layers.1.self_attn.learnable_sink_param": "model.layers.1.self_attn.sinks",
        "model.layers.1.self_attn.linear_gate.weight": "model.layers.1.self_attn.g_proj.weight",
        "model.norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    known = {known_as: name for name, known_as in published.items()}
    further = ["model.mtp_layers.0.self_attn.linear_gate.weight", "model.mtp_layers.0.eh_proj.weight"]
    assert text_model_names([*further, *published]) == known
    assert {name: as_hy(known_as) for name, known_as in published.items()} == {name: name for name in published}
    renamed = [name.replace("experts.gate_proj", "experts.linear_gate") for name in published]  # as transformers does
    assert text_model_names(renamed) == {
        known_as: name for name, known_as in zip(renamed, published.values(), strict=True)
    }
