"""Ling-2.5 and 2.6: published checkpoints against the published formulas in float64, and what of configs is read."""

from __future__ import annotations

import json
from functools import cache
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from ling25_reference import OTHER, SMALL, Ling25, shapes, write_checkpoint
from safetensors.torch import load_file, save_file
from test_parity import IDS, TOLERANCE, error, run
from torch import Tensor

from latentkv import kernels
from latentkv.errors import CheckpointError, ConfigError
from latentkv.models.batch import Batch, SlotUse
from latentkv.models.config import LightningConfig, MLAConfig
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.lightning import LightningAttention
from latentkv.models.loading import load_model, save_pretrained
from latentkv.models.packing import Packing
from latentkv.models.parameters import count_mtp_parameters, count_parameters
from latentkv.state import PagedCache

FOLDERS = TemporaryDirectory(prefix="latentkv-ling25-")  # removed when the process ends
CONFIGS = {"small": SMALL, "other": OTHER}
by_name = pytest.mark.parametrize("name", CONFIGS)


@cache
def reference(name: str) -> tuple[Path, Tensor]:
    """A checkpoint, and its logits [T, V] for IDS."""
    folder = Path(FOLDERS.name) / name
    tensors = write_checkpoint(folder, CONFIGS[name])
    return folder, Ling25(CONFIGS[name], tensors).logits(IDS).float()


CUTS = [[1, 68], [63, 6], [64, 1, 4], [65, 4], [37, *[1] * 32]]


@pytest.mark.thin(meet=1)
@by_name
@pytest.mark.parametrize(
    ("cuts", "form"), [(cuts, ["absorbed", "expanded", None][i % 3]) for i, cuts in enumerate(CUTS)], ids=str
)
def test_a_prompt_cut_anywhere_gives_the_published_logits(name: str, cuts: list[int], form: str | None) -> None:
    folder, expected = reference(name)
    logits = run(load_model(folder), cuts, form)
    assert error(logits, expected) <= TOLERANCE
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@by_name
def test_whole_sequences_without_a_cache_give_the_published_logits(name: str) -> None:
    folder, expected = reference(name)
    decoder = load_model(folder)
    with torch.inference_mode():
        assert error(decoder.logits(decoder.forward_train(torch.tensor([IDS])))[0], expected) <= TOLERANCE


def test_slopes_are_those_of_the_modelling_file_where_the_config_says_so(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, SMALL | {"slope_layer_offset": -1})
    expected = Ling25(SMALL, tensors, slope_layer=-1).logits(IDS).float()
    assert error(run(load_model(tmp_path), [69]), expected) <= TOLERANCE < error(reference("small")[1], expected)


@by_name
def test_changing_any_tensor_changes_the_logits_beyond_the_tolerance(name: str) -> None:
    folder, logits = reference(name)
    expected, ids = logits[:24], torch.tensor([IDS[:24]])
    decoder, generator = load_model(folder), torch.Generator().manual_seed(2)
    for key, tensor in decoder.state_dict().items():
        if key.startswith("mtp."):
            continue
        saved = tensor.clone()
        tensor += torch.randn(tensor.shape, generator=generator) * 0.05
        with torch.inference_mode():
            logits = decoder.logits(decoder.forward_train(ids))[0]
        tensor.copy_(saved)
        assert error(logits, expected) > TOLERANCE, key


@pytest.mark.parametrize(
    "change",
    [
        {"group_norm_size": 4},
        {"rms_norm_eps": 0.05},
        {"rope_theta": 3000.0},
        {"routed_scaling_factor": 1.1},
        {"norm_topk_prob": False},
        {"num_experts_per_tok": 2},
        {"topk_group": 1},
        {"slope_layer_offset": -1},
        {"rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_changing_any_meaningful_config_field_changes_the_logits(change: dict[str, Any], tmp_path: Path) -> None:
    folder, expected = reference("small")
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SMALL | change))
    assert error(run(load_model(tmp_path), [69]), expected) > TOLERANCE


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_the_mtp_module_is_latent_attention_and_gives_the_published_states(form: Any, tmp_path: Path) -> None:
    config = SMALL | {"layer_types": ["full_attention", "linear_attention"] * 2}  # its last layer is none
    tensors = write_checkpoint(tmp_path, SMALL)
    expected = Ling25(SMALL, tensors).mtp_hidden(IDS[:30]).float()
    decoder = load_model(tmp_path)
    with torch.inference_mode():
        ids = torch.tensor([IDS[:30]])
        whole = decoder.mtp_hidden(0, decoder.forward_train(ids[:, :-1]), ids[:, 1:])[0]
        assert error(whole, expected) <= TOLERANCE
        assert error(paged_mtp(decoder, form), expected) <= TOLERANCE
    assert isinstance(read_config(config).mtp_layer.attention, MLAConfig)


def paged_mtp(decoder: Decoder, form: Any) -> Tensor:
    """Of the first 30 tokens, by way of a cache."""
    cache = PagedCache(decoder.config.specs("fp32", mtp=torch.float32), 4, page_size=8)
    text, pages, use = IDS[:30], [[3, 0, 2, 1]], [SlotUse(slot=0, pending=0, committed=29)]
    states = decoder(Batch.build([text[:29]], [0], pages, page_size=8, slots=use), cache, form=form)
    own = Batch.build([text[1:]], [1], pages, page_size=8, kv_start=1)
    return decoder.run_mtp(*decoder.mtp_inputs(states, own), own, cache, form=form)


@by_name
def test_a_saved_checkpoint_has_the_published_names_and_reads_the_same(name: str, tmp_path: Path) -> None:
    folder, _ = reference(name)
    decoder = load_model(folder)
    save_pretrained(decoder, tmp_path)
    published, saved = (load_file(each / "model.safetensors") for each in (folder, tmp_path))
    assert published.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in published.items())
    assert torch.equal(run(load_model(tmp_path), [69]), run(decoder, [69]))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, SMALL)
    del tensors["model.layers.0.attention.g_norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.0\.\w+\.g_norm\.weight"):
        load_model(tmp_path)


@pytest.mark.skipif(kernels.extension is None, reason="the native kernels are not built")
@by_name
def test_packing_changes_no_logits(name: str, tmp_path: Path) -> None:
    tensors = {key: t.bfloat16().float() for key, t in write_checkpoint(tmp_path, CONFIGS[name]).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    packed, plain = load_model(tmp_path, packing=Packing()), load_model(tmp_path)
    left = {key for key, parameter in packed.named_parameters() if parameter.ndim > 1}
    assert {key for key in left if not key.endswith("mlp.gate.weight")} == {"model.embed_tokens.weight"}
    assert error(run(packed, [37, *[1] * 32]), run(plain, [69])) <= TOLERANCE


def test_in_bf16_the_pace_of_forgetting_is_not_rounded() -> None:
    exact, rounded = (load_model(reference("small")[0], dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for one, other in zip(exact.modules(), rounded.modules(), strict=True):
        if isinstance(one, LightningAttention) and isinstance(other, LightningAttention):
            assert torch.equal(one._weights.log_decay, other._weights.log_decay)  # pyright: ignore[reportPrivateUsage]
            assert other._weights.log_decay.dtype == torch.float32  # pyright: ignore[reportPrivateUsage]


def test_parameters_are_counted_and_named_as_they_are_stored() -> None:
    for config in CONFIGS.values():
        mtp = f"model.layers.{config['num_hidden_layers']}."
        sizes = {key: prod(shape) for key, shape in shapes(config).items() if not key.endswith("expert_bias")}
        assert count_parameters(read_config(config)) == sum(n for key, n in sizes.items() if not key.startswith(mtp))
        assert count_mtp_parameters(read_config(config)) == sum(n for key, n in sizes.items() if key.startswith(mtp))


def test_a_decoder_that_is_to_be_trained_learns_in_every_part() -> None:
    torch.manual_seed(0)
    decoder = Decoder(read_config(SMALL | {"num_nextn_predict_layers": 0})).train()
    decoder.logits(decoder.forward_train(torch.tensor([IDS[:20]]))).square().mean().backward()
    for module in decoder.modules():
        if isinstance(module, LightningAttention):
            for key, parameter in module.named_parameters():
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


FLASH = {
    "architectures": ["BailingMoeV2_5ForCausalLM"],
    "model_type": "bailing_hybrid",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "layer_group_size": 8,
    "q_lora_rank": 1536,
    "rotary_dim": 64,
    "num_nextn_predict_layers": 1,
}


def test_published_keys_are_read() -> None:
    config = read_config(FLASH)
    kinds = [i for i, layer in enumerate(config.layers) if isinstance(layer.attention, MLAConfig)]
    assert kinds == [7, 15, 23, 31] and config.num_recurrent_layers == 28
    assert config.cached_attention == MLAConfig(512, 128, 64, 128, 1536)
    assert config.layers[0].attention == LightningConfig(32, 128, 1e-6, 4, 1.00001)
    assert config.layers[30].attention == LightningConfig(32, 128, 1e-6, 4, pytest.approx(1 / 31 + 1e-5))
    assert config.rope.interleaved and config.layers[0].rope is not None and not config.layers[0].rope.interleaved
    assert config.moe is not None and config.moe.normalize_weights and config.moe.group_score == "top2"
    other = read_config(FLASH | {"slope_layer_offset": -1}).layers[0].attention
    assert isinstance(other, LightningConfig) and other.decay_scale == pytest.approx(1 + 1 / 31 + 1e-5)


def test_ling_3_is_read_as_ever() -> None:
    assert read_config({"model_type": "bailing_hybrid"}).num_recurrent_layers == 35
    assert not isinstance(read_config({"model_type": "bailing_hybrid"}).recurrent, LightningConfig)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"use_qk_norm": False}, "use_qk_norm=False .*only True"),
        ({"linear_rope": False}, "linear_rope"),
        ({"linear_silu": True}, "linear_silu=True .*only False"),
        ({"use_linear_silu": True}, "use_linear_silu"),
        ({"use_bias": True}, "use_bias"),
        ({"use_qkv_bias": True}, "use_qkv_bias"),
        ({"gated_attention_proj_granularity_type": "head_wise"}, "gated_attention_proj_granularity_type"),
        ({"num_kv_heads_for_linear_attn": 8}, "num_kv_heads_for_linear_attn=8 .*only 32"),
        ({"group_norm_size": 7}, "7 groups cannot share 4096"),
        ({"partial_rotary_factor": 0.25, "rotary_dim": None}, "32 of 128 .*qk_rope_head_dim=64|partial_rotary_factor"),
        ({"rotary_dim": 32}, "32 of 128 dimensions .*qk_rope_head_dim=64"),
        ({"slope_layer_offset": 1}, "0 or -1, not 1"),
        ({"num_hidden_layers": 33}, "layer_group_size=8"),
        ({"layer_types": ["linear_attention"] * 32}, "no layer reads past tokens"),
        ({"architectures": ["BailingMoeLinearV2ForCausalLM"]}, "Ring-2.0-linear.*not supported"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(FLASH | changed)
