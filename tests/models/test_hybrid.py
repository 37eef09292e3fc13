"""Recurrent layers beside latent attention: prompts cut anywhere, what transformers leaves out, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families_for_tests import BAILING, CASES, KIMI_LINEAR, MSCALE, Case, save_checkpoint
from safetensors.torch import load_file, save_file
from test_parity import IDS, TOLERANCE, error, reference, run
from torch import Tensor, nn

from latentkv.errors import CacheError, ConfigError
from latentkv.models.batch import Batch
from latentkv.models.config import KDAConfig, MLAConfig, RopeConfig
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.kda import EXACT, KimiDeltaAttention
from latentkv.models.loading import load_model
from latentkv.models.mla import MultiHeadLatentAttention
from latentkv.models.rope import rotary
from latentkv.models.stored_config import open_checkpoint
from latentkv.state import PagedCache

HYBRIDS = [case for case in CASES if case.model_type in ("bailing_hybrid", "kimi_linear", "glm5_next")]
by_name = pytest.mark.parametrize("case", HYBRIDS, ids=lambda case: case.name)


CUTS = [[1, 68], [63, 6], [64, 1, 4], [65, 4], [1, 62, 1, 1, 4]]
FORMS = ["absorbed", "expanded", None]


@pytest.mark.thin(meet=1)
@by_name
@pytest.mark.parametrize(("cuts", "form"), [(cuts, FORMS[i % 3]) for i, cuts in enumerate(CUTS)], ids=str)
def test_a_prompt_cut_anywhere_gives_transformers_logits(case: Case, cuts: list[int], form: str | None) -> None:
    folder, expected = reference(case.name)
    assert error(run(load_model(folder), cuts, form), expected) <= TOLERANCE


@pytest.mark.slow
@by_name
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cuts", [*CUTS, [1] * 69, [2, 3, 5, 7, 11, 13, 17, 11]], ids=str)
def test_a_prompt_cut_anywhere_does_so_in_every_form(case: Case, form: str | None, cuts: list[int]) -> None:
    test_a_prompt_cut_anywhere_gives_transformers_logits(case, cuts, form)


@by_name
@pytest.mark.parametrize("kv_format", ["fp32", "int8", "fp8"])
def test_a_cache_in_every_format_serves_the_layers_that_have_one(case: Case, kv_format: str) -> None:
    config, _ = open_checkpoint(reference(case.name)[0])
    specs = config.specs(kv_format)  # pyright: ignore[reportArgumentType]
    cache = PagedCache(specs, 3, page_size=16, num_slots=2)
    cache.check()
    kinds = [layer.attention for layer in config.layers]
    assert [spec.recurrent is None for spec in specs] == [isinstance(kind, MLAConfig) for kind in kinds]
    assert [spec.tokens is None for spec in specs] == [isinstance(kind, KDAConfig) for kind in kinds]


def test_a_step_without_slots_is_refused() -> None:
    decoder = load_model(reference("ling3")[0])
    cache = PagedCache(decoder.config.specs("fp32"), 2, page_size=16)
    batch = Batch.build([[5]], [0], [[0]], page_size=16)
    with pytest.raises(CacheError, match="slots"), torch.inference_mode():
        decoder(batch, cache)


MIXES = ("_hc.fn", "_hc.base", "_hc.scale", "weights_proj.weight", "index_kpool_compress_ape")


@by_name
def test_what_forgets_or_mixes_stays_float32_in_a_bf16_model(case: Case) -> None:
    decoder = load_model(reference(case.name)[0], dtype=torch.bfloat16)
    for name, parameter in decoder.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith(EXACT + MIXES) else torch.bfloat16), name
    exact = load_model(reference(case.name)[0]).state_dict()
    for name, parameter in decoder.named_parameters():
        if name.endswith(EXACT + MIXES):
            assert torch.equal(parameter, exact[name])


# What transformers leaves out is put into its modules by hand.


def rewritten(
    tmp_path: Path,
    config: dict[str, Any],
    saved: dict[str, Any],
    change: Callable[[Any, dict[str, Tensor]], None],
) -> tuple[Decoder, Tensor]:
    """A checkpoint that is changed as its transformers model is: its decoder, and the model's logits in float64."""
    model = save_checkpoint(Case("changed", "bailing_hybrid", config, saved), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    model: Any = model.double()
    for layer in model.model.layers[2:]:
        limit_layer(layer.mlp, 0, 0)  # transformers' own experts take no float64
    change(model, tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with torch.inference_mode():
        return load_model(tmp_path), model(torch.tensor([IDS])).logits[0].float()


def limited(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    silu = gate / (1 + torch.exp(-gate))
    return torch.minimum(silu, torch.full_like(silu, limit)) * torch.minimum(up.abs(), torch.tensor(limit)) * up.sign()


def limit_layer(mlp: Any, routed: float, shared: float) -> None:
    """Experts of one layer of transformers, one token and one expert at a time."""

    def experts(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for t, chosen in enumerate(ids.tolist()):
            for k, e in enumerate(chosen):
                gate, up = (mlp.experts.gate_up_proj[e] @ x[t]).chunk(2)
                inner = limited(gate, up, routed) if routed else torch.nn.functional.silu(gate) * up
                out[t] += weights[t, k] * (mlp.experts.down_proj[e] @ inner)
        return out

    mlp.experts.forward = experts
    if shared:
        own = mlp.shared_experts
        own.forward = lambda x: own.down_proj(limited(own.gate_proj(x), own.up_proj(x), shared))


LIMITS = {"expert_swiglu_limit_list": [0, 0, 0.11, 0.07], "share_expert_swiglu_limit_list": [None, 0, 0.09, None]}


def test_activations_are_limited_as_published(tmp_path: Path) -> None:
    def change(model: Any, tensors: dict[str, Tensor]) -> None:
        limit_layer(model.model.layers[2].mlp, 0.11, 0.09)
        limit_layer(model.model.layers[3].mlp, 0.07, 0)

    decoder, expected = rewritten(tmp_path, BAILING | {"first_k_dense_replace": 2}, LIMITS, change)
    assert error(run(decoder, [37, *[1] * 32]), expected) <= TOLERANCE
    for key in LIMITS:  # each list matters, and without them the model is transformers'
        saved = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(saved | {key: None}))
        assert error(run(load_model(tmp_path), [69]), expected) > TOLERANCE
        (tmp_path / "config.json").write_text(json.dumps(saved))


def test_without_its_lists_of_limits_a_model_is_computed_as_transformers_does(tmp_path: Path) -> None:
    config = BAILING | {"first_k_dense_replace": 2}
    decoder, expected = rewritten(tmp_path, config, dict.fromkeys(LIMITS), lambda model, tensors: None)
    assert error(run(decoder, [69]), expected) <= TOLERANCE


def test_queries_may_come_from_a_latent_as_published(tmp_path: Path) -> None:
    rank = 11

    def change(model: Any, tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(4)
        for index in (1, 3):
            down = torch.randn(rank, 48, generator=generator) * 0.2
            norm = 1 + torch.randn(rank, generator=generator) * 0.3
            up = torch.randn(60, rank, generator=generator) * 0.2

            def queries(x: Tensor, down: Tensor = down, norm: Tensor = norm, up: Tensor = up) -> Tensor:
                latent = x @ down.double().T
                latent = latent / torch.sqrt(latent.square().mean(-1, keepdim=True) + 1e-6) * norm.double()
                return latent @ up.double().T

            model.model.layers[index].self_attn.q_proj.forward = queries
            prefix = f"model.layers.{index}.attention"
            del tensors[f"{prefix}.q_proj.weight"]
            tensors |= {
                f"{prefix}.q_a_proj.weight": down,
                f"{prefix}.q_a_layernorm.weight": norm,
                f"{prefix}.q_b_proj.weight": up,
            }

    config = BAILING | {"first_k_dense_replace": 2, "rope_parameters": MSCALE}
    decoder, expected = rewritten(tmp_path, config, {"q_lora_rank": rank}, change)
    assert error(run(decoder, [37, *[1] * 32]), expected) <= TOLERANCE


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize("rope", [0, 8])
@pytest.mark.parametrize("gate", ["head", "element"])
def test_what_heads_give_is_gated_before_the_output_projection(gate: Any, rope: int, form: Any) -> None:
    torch.manual_seed(0)
    sizes = {"kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": rope, "v_head_dim": 10}
    plain, gated = (MultiHeadLatentAttention(30, 3, **sizes, output_gate=kind) for kind in (None, gate))
    gated.load_state_dict(plain.state_dict(), strict=False)
    for module in (plain, gated):
        nn.init.eye_(module.o_proj.weight)
    x = torch.randn(2, 9, 30)
    with torch.inference_mode():
        heads, gates = plain(x, form=form).unflatten(-1, (3, 10)), (x @ gated.g_proj.weight.T).sigmoid()
        expected = heads * gates.unflatten(-1, (3, -1))
        torch.testing.assert_close(gated(x, form=form).unflatten(-1, (3, 10)), expected)


@pytest.mark.parametrize("name", ["ling3", "kimi-linear"])
def test_rates_may_be_stored_as_a_list_or_with_sizes_of_one_around(name: str, tmp_path: Path) -> None:
    folder, expected = reference(name)
    tensors = load_file(folder / "model.safetensors")
    for key, tensor in tensors.items():
        if key.endswith("A_log"):
            tensors[key] = tensor.flatten() if tensor.ndim > 1 else tensor.view(1, 1, -1, 1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert error(run(load_model(tmp_path), [69]), expected) <= TOLERANCE


def test_without_rotation_positions_change_nothing() -> None:
    angles = rotary(RopeConfig(8, kind="none"), torch.tensor([0, 5, 10**6]), max_context=1)
    assert torch.equal(angles.cos, torch.ones(3, 4)) and torch.equal(angles.sin, torch.zeros(3, 4))


LING = {"model_type": "bailing_hybrid", "num_hidden_layers": 12}
KIMI = {"model_type": "kimi_linear"}
NESTED = {"head_dim": 64, "num_heads": 16, "short_conv_kernel_size": 4}


def test_published_keys_of_ling_3_are_read() -> None:
    published = {
        "architectures": ["BailingMoeV3ForCausalLM"],
        "head_dim": 96,
        "layer_group_size": 4,
        "q_lora_rank": 256,
        "partial_rotary_factor": 0.5,
        "qk_rope_head_dim": 48,
        "num_experts": 128,
        "no_kda_lora": True,
        "score_function": "sigmoid",
        "gated_attention_proj_granularity_type": "element_wise",
        "moe_shared_expert_intermediate_size": 768,
    }
    config = read_config(LING | published)
    kinds = [isinstance(layer.attention, MLAConfig) for layer in config.layers]
    assert kinds == [False, False, False, True] * 3
    assert config.cached_attention == MLAConfig(512, 128, 48, 128, 256, output_gate="element")
    assert config.layers[0].attention == KDAConfig(32, 96, 1e-6, -5.0, low_rank_gates=False)
    assert config.moe is not None and config.moe.num_experts == 128


def test_published_keys_of_kimi_linear_are_read() -> None:
    full, kda = [4, 8, 12, 16, 20, 24, 27], [i for i in range(1, 28) if i % 4 and i != 27]
    published = {
        "linear_attn_config": NESTED | {"full_attn_layers": full, "kda_layers": kda},
        "mla_use_nope": True,
        "model_max_length": 1234,
        "num_experts_per_token": 6,
        "moe_router_activation_func": "sigmoid",
    }
    config = read_config(KIMI | published)
    assert [i + 1 for i, layer in enumerate(config.layers) if isinstance(layer.attention, MLAConfig)] == full
    assert config.layers[0].attention == KDAConfig(16, 64, 1e-5, None, low_rank_gates=True, rates_around=True)
    assert config.rope.kind == "none" and config.max_positions == 1234
    assert config.moe is not None and config.moe.experts_per_token == 6


@pytest.mark.parametrize(
    "raw, message",
    [
        (LING | {"no_kda_lora": False}, "no_kda_lora"),
        (LING | {"gated_attention_proj_granularity_type": "x"}, "head_wise and element_wise"),
        (LING | {"num_hidden_layers": 13}, "layer_group_size=6"),
        (LING | {"layer_types": ["full_attention"] * 11}, "each of 12 layers"),
        (LING | {"layer_types": ["linear_attention"] * 12}, "no layer reads past tokens"),
        (LING | {"short_conv_kernel_size": 3}, "only 4"),
        (LING | {"kda_lower_bound": 2.0}, "kda_lower_bound"),
        (LING | {"kda_lower_bound": -200.0}, "kda_lower_bound"),
        (LING | {"expert_swiglu_limit_list": [0] * 11}, "for each of 12 layers"),
        (LING | {"expert_swiglu_limit_list": [4.0] + [0] * 11}, "layer 0 the limit 4.0"),
        (LING | {"share_expert_swiglu_limit_list": [0] * 11 + [-4.0]}, "layer 11 the limit -4.0"),
        (LING | {"moe_shared_expert_intermediate_size": 1}, "only 768"),
        (LING | {"score_function": "softmax"}, "sigmoid"),
        (KIMI | {"mla_use_nope": False}, "mla_use_nope"),
        (KIMI | {"linear_attn_config": 3}, "must be an object"),
        (KIMI | {"linear_attn_config": NESTED | {"head_dim": "x"}}, "linear_attn_config.head_dim"),
        (KIMI | {"linear_attn_config": {"full_attn_layers": [1], "kda_layers": [2]}}, "once"),
        (KIMI | {"linear_attn_config": {"full_attn_layers": 1, "kda_layers": [2]}}, "once"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(raw)


@pytest.mark.parametrize("config", [BAILING, KIMI_LINEAR], ids=["ling3", "kimi-linear"])
def test_a_decoder_that_is_to_be_trained_learns_in_every_part(config: dict[str, Any]) -> None:
    model_type = "bailing_hybrid" if config is BAILING else "kimi_linear"
    torch.manual_seed(0)
    decoder = Decoder(read_config({"model_type": model_type, "num_nextn_predict_layers": 0} | config)).train()
    hidden = decoder.forward_train(torch.tensor([IDS[:20]]))
    decoder.logits(hidden).square().mean().backward()
    for module in decoder.modules():
        if isinstance(module, KimiDeltaAttention):
            for name, parameter in module.named_parameters():
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
