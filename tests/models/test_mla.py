"""Latent attention as a module of its own: both forms, the choice between them, chunks, cache formats."""

from __future__ import annotations

import pytest
import torch

from latentkv import MultiHeadLatentAttention
from latentkv.errors import ConfigError
from latentkv.models.batch import Batch
from latentkv.models.config import MLAConfig, RopeConfig
from latentkv.models.forms import choose_form
from latentkv.models.mla import chunk_bounds
from latentkv.models.rope import rotary
from latentkv.ops import reference
from latentkv.state import PagedCache
from latentkv.state.spec import KVFormat, LatentSpec, LayerSpec

V2_LITE = MLAConfig(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)


def attention(dtype: torch.dtype = torch.float64, **changes: object) -> MultiHeadLatentAttention:
    torch.manual_seed(0)
    shape = {"kv_lora_rank": 32, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10} | changes
    return MultiHeadLatentAttention(40, 3, **shape).to(dtype)  # type: ignore[arg-type]


def paged(
    module: MultiHeadLatentAttention, x: torch.Tensor, lengths: list[int], form: str | None, fmt: KVFormat
) -> torch.Tensor:
    """x [T, hidden] of one sequence, fed in steps through a paged cache."""
    config = module.config
    cache = PagedCache([LayerSpec(LatentSpec(config.kv_lora_rank, config.qk_rope_head_dim, fmt))], 12, page_size=8)
    pages, outputs, done = cache.pool.allocate(cache.pages_for(len(x)))[::-1], [], 0
    for length in lengths:
        batch = Batch.build([[0] * length], [done], [pages], page_size=8)
        angles = rotary(module.rope, batch.positions, max_context=module.max_context)
        part = x[done : done + length]
        outputs.append(module.attend(part, angles, batch, cache.view(0), form=form))
        done += length
    return torch.cat(outputs)


def test_both_forms_agree_to_1e_12_in_float64() -> None:
    module, x = attention(), torch.randn(2, 37, 40, dtype=torch.float64)
    with torch.no_grad():
        assert (module(x, form="expanded") - module(x, form="absorbed")).abs().max() <= 1e-12


def test_both_forms_have_the_same_gradients() -> None:
    gradients = []
    for form in ("expanded", "absorbed"):
        module = attention(q_lora_rank=16, bias=True)
        module(torch.ones(1, 9, 40, dtype=torch.float64).cumsum(1).sin(), form=form).square().sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-9


def test_the_module_computes_the_reference_definition() -> None:
    module, x = attention(), torch.randn(1, 11, 40, dtype=torch.float64)
    config = module.config
    angles = rotary(module.rope, torch.arange(11), max_context=11)
    cos, sin = angles.cos.double(), angles.sin.double()
    with torch.no_grad():
        q = module.q_proj(x[0]).view(11, 3, -1)
        latent, k_rope = module.kv_a_proj_with_mqa(x[0]).split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        latent = reference.rms_norm(latent, module.kv_a_layernorm.weight, config.latent_norm_eps)
        w_uk, w_uv = module.kv_b_proj.weight.view(3, -1, config.kv_lora_rank).split([12, 10], dim=1)
        q_rope = reference.apply_rope(q[..., 12:], cos, sin, interleaved=True)
        k_rope = reference.apply_rope(k_rope, cos, sin, interleaved=True)
        stop = torch.arange(1, 12)
        heads = reference.mla_expanded(q[..., :12], q_rope, latent, k_rope, w_uk, w_uv, stop, module.scale)
        assert (module.o_proj(heads.flatten(1)) - module(x)[0]).abs().max() <= 1e-12


@pytest.mark.parametrize("form", ["absorbed", "expanded", None])
@pytest.mark.parametrize("lengths", [[45], [20, 1, 1, 23], [1] * 45])
@pytest.mark.parametrize("rope", [8, 0])
def test_the_cache_gives_what_whole_sequences_give(form: str | None, lengths: list[int], rope: int) -> None:
    module, x = attention(torch.float32, qk_rope_head_dim=rope), torch.randn(45, 40)
    module.expand_chunk = 16
    with torch.no_grad():
        expected = module(x[None])[0]
        assert (paged(module, x, lengths, form, "fp32") - expected).abs().max() <= 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_half_precision_differs_from_float32_by_its_rounding_only(form: str, dtype: torch.dtype) -> None:
    module, x = attention(torch.float32), torch.randn(45, 40).to(dtype)
    with torch.no_grad():
        expected = module.to(dtype).to(torch.float32)(x[None].float())[0]
        got = paged(module.to(dtype), x, [30, 1, 14], form, "fp16" if dtype == torch.float16 else "bf16").float()
    assert (got - expected).abs().max() <= 6 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("rope", [8, 0])
@pytest.mark.parametrize("fmt", ["bf16", "int8", "fp8"])
def test_a_rounded_cache_gives_the_same_in_one_piece_or_in_several(fmt: KVFormat, rope: int) -> None:
    module, x = attention(torch.float32, qk_rope_head_dim=rope), torch.randn(45, 40)
    with torch.no_grad():
        whole = paged(module, x, [45], "expanded", fmt)
        pieces = paged(module, x, [13, 30, 1, 1], "expanded", fmt)
        absorbed = paged(module, x, [45], "absorbed", fmt)
    assert (whole - pieces).abs().max() <= 2e-6
    assert (whole - absorbed).abs().max() <= 2e-6


def test_several_sequences_of_unlike_lengths_share_a_step_without_touching_each_other() -> None:
    module = attention(torch.float32)
    inputs = [torch.randn(n, 40) for n in (5, 1, 30)]
    cache = PagedCache([LayerSpec(LatentSpec(32, 8, "fp32"))], 12, page_size=8)
    pages = [cache.pool.allocate(cache.pages_for(len(x))) for x in inputs]
    batch = Batch.build([[0] * len(x) for x in inputs], [0, 0, 0], pages, page_size=8)
    angles = rotary(module.rope, batch.positions, max_context=module.max_context)
    with torch.no_grad():
        together = module.attend(torch.cat(inputs), angles, batch, cache.view(0))
        alone = torch.cat([paged(module, x, [len(x)], None, "fp32") for x in inputs])
    assert (together - alone).abs().max() <= 1e-6


def test_the_cheaper_form_changes_at_171_new_tokens_of_a_long_context() -> None:
    context = 1_000_000
    assert choose_form(V2_LITE, 1, context) == "absorbed"
    assert choose_form(V2_LITE, 170, context + 170) == "absorbed"
    assert choose_form(V2_LITE, 172, context + 172) == "expanded"
    assert choose_form(V2_LITE, 2048, 2048) == "expanded"


def test_chunks_cover_every_token_once_and_never_cross_the_first_new_one() -> None:
    for first, past, total, chunk in [
        (0, 0, 5, 8),
        (0, 16, 17, 8),
        (0, 13, 40, 8),
        (0, 0, 64, 64),
        (1, 1, 9, 4),
        (1, 18, 20, 8),
    ]:
        bounds = chunk_bounds(first, past, total, chunk)
        assert [t for begin, end in bounds for t in range(begin, end)] == list(range(first, total))
        assert all(end - begin <= chunk and not begin < past < end for begin, end in bounds)


def test_rope_of_another_width_is_refused() -> None:
    with pytest.raises(ConfigError, match="qk_rope_head_dim"):
        attention(rope=RopeConfig(dim=4))
