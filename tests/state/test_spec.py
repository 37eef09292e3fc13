import pytest
import torch

from latentkv.errors import CacheError, OpError
from latentkv.ops import encode_latents, read_latents, write_latents
from latentkv.state import (
    PAGE_SIZE,
    KeyValueSpec,
    LatentSpec,
    LayerSpec,
    PagedCache,
    bytes_per_token,
    mha_bytes_per_token,
)

# layers, kv_lora_rank, qk_rope_head_dim -> bf16 bytes per token, from the published configs.
PUBLISHED = {
    "DeepSeek-V2": (60, 512, 64, 69_120),
    "DeepSeek-V3": (61, 512, 64, 70_272),
    "DeepSeek-V2-Lite": (27, 512, 64, 31_104),
    "GLM-4.7-Flash": (47, 512, 64, 54_144),
    "MiniCPM3-4B": (62, 256, 32, 35_712),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_models_cost_their_known_bytes_per_token(model):
    layers, latent_dim, rope_dim, expected = PUBLISHED[model]
    assert bytes_per_token([LayerSpec(LatentSpec(latent_dim, rope_dim, "bf16"))] * layers) == expected


@pytest.mark.parametrize(("fmt", "row"), [("fp32", 2304), ("bf16", 1152), ("fp16", 1152), ("fp8", 656), ("int8", 592)])
def test_a_row_of_the_usual_shape_has_its_documented_size(fmt, row):
    assert LatentSpec(512, 64, fmt).token_bytes == row


def test_int8_is_under_a_sixteenth_of_published_mha():
    # DeepSeek-V2: 128 heads of 128 + 64 key and 128 value dims.
    mha = mha_bytes_per_token(60, 128, 128 + 64, 128)
    assert mha == 60 * 2 * 128 * (128 + 64 + 128)
    assert bytes_per_token([LayerSpec(LatentSpec(512, 64, "int8"))] * 60) * 16 < mha


@pytest.mark.parametrize("fmt", ["fp32", "bf16", "fp16", "fp8", "int8"])
@pytest.mark.parametrize(("latent_dim", "rope_dim"), [(512, 64), (100, 6), (7, 3)])
def test_latents_allocate_exactly_their_formula(fmt, latent_dim, rope_dim):
    spec = LatentSpec(latent_dim, rope_dim, fmt)
    pages = spec.allocate(5, 4)
    assert pages.shape[:2] == (5, 4)
    assert pages.nbytes == pages.untyped_storage().nbytes() == spec.token_bytes * 4 * 5
    assert spec.token_bytes % 16 == 0


@pytest.mark.parametrize("fmt", ["fp32", "bf16", "fp8", "int8"])
def test_what_is_written_into_a_layer_is_read_back_and_no_other_layer_changes(fmt):
    cache = PagedCache([LayerSpec(LatentSpec(40, 6, fmt))] * 2, 3, page_size=4)
    first, second = cache.view(0).pages, cache.view(1).pages
    generator = torch.Generator().manual_seed(0)
    latents, k_rope = torch.randn(9, 40, generator=generator), torch.randn(9, 6, generator=generator)
    write_latents(second, torch.arange(9), latents, k_rope, kv_format=cache.format)
    shape = {"latent_dim": 40, "rope_dim": 6, "kv_format": cache.format, "dtype": torch.float32}
    found = read_latents(second, torch.tensor([0, 1, 2]), 0, 9, **shape)
    torch.testing.assert_close(found, torch.cat([latents, k_rope], 1), atol=0.3 if fmt == "fp8" else 0.03, rtol=0.05)
    assert not first.any()
    assert encode_latents(latents, k_rope, fmt).shape[1] == second.shape[2]


@pytest.mark.parametrize(("fmt", "size"), [("fp32", 4), ("bf16", 2), ("fp16", 2)])
def test_keys_and_values_allocate_exactly_their_formula(fmt, size):
    spec = KeyValueSpec(3, 8, fmt)
    pages = spec.allocate(5, PAGE_SIZE)
    assert pages.shape == (5, 64, 2, 3, 8)
    assert pages.nbytes == spec.token_bytes * 64 * 5
    assert spec.token_bytes == 2 * 3 * 8 * size == mha_bytes_per_token(1, 3, 8, 8, element_bytes=size)


@pytest.mark.parametrize("fmt", ["fp8", "int8", "fp64"])
def test_keys_and_values_refuse_formats_they_cannot_be_stored_in(fmt):
    with pytest.raises(CacheError, match=f"{fmt}.*fp32, bf16, fp16"):
        KeyValueSpec(1, 8, fmt)


def test_an_unknown_latent_format_is_refused_by_name():
    with pytest.raises(OpError, match="int3"):
        _ = LatentSpec(8, 4, "int3").token_bytes
