"""LongCat-Flash: pairs of layers under shortcuts to experts, scaled latents, and files with names of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families_for_tests import CASES, LONGCAT, VOCAB, save_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from latentkv.cli.checkpoint_facts import read_facts
from latentkv.errors import CheckpointError, ConfigError
from latentkv.models.batch import Batch
from latentkv.models.config import MLAConfig, ModelConfig
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder, DecoderLayer
from latentkv.models.loading import load_model, save_pretrained
from latentkv.models.packing import Packing
from latentkv.plan import count_parameters
from latentkv.state import PagedCache

CASE = next(case for case in CASES if case.name == "longcat")
IDS = torch.randint(3, VOCAB, (1, 23), generator=torch.Generator().manual_seed(1))
PUBLISHED = {
    "model_type": "longcat_flash",
    "num_layers": 28,
    "moe_topk": 12,
    "ffn_hidden_size": 12288,
    "expert_ffn_hidden_size": 2048,
    "zero_expert_num": 256,
    "zero_expert_type": "identity",
    "attention_method": "MLA",
    "router_bias": False,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "rope_theta": 1e7,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that transformers wrote."""
    save_checkpoint(CASE, tmp_path)
    return tmp_path


def logits(decoder: Decoder) -> torch.Tensor:
    with torch.inference_mode():
        return decoder.logits(decoder.forward_train(IDS))


def restored(folder: Path, keep: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, but for those of zero experts, stored anew with what `keep` says."""
    tensors = load_file(folder / "model.safetensors")
    zero = [f".experts.{e}." for e in range(LONGCAT["n_routed_experts"], 20)]
    kept = {name: t for name, t in tensors.items() if keep == "all" or not any(part in name for part in zero)}
    assert keep == "all" or len(tensors) - len(kept) == 2 * 2 * LONGCAT["zero_expert_num"]
    return kept


def test_published_keys_mean_what_the_defaults_of_transformers_do() -> None:
    published, default = read_config(PUBLISHED), read_config({"model_type": "longcat_flash"})
    assert published == default
    assert [layer.shortcut for layer in default.layers] == ["begins", "ends"] * 28
    assert [layer.moe is None for layer in default.layers] == [True, False] * 28
    assert default.num_mtp_layers == read_config(PUBLISHED | {"num_nextn_predict_layers": 1}).num_mtp_layers == 0
    attention = default.attention
    assert isinstance(attention, MLAConfig)
    assert (attention.q_lora_scale, attention.kv_lora_scale) == (2.0, 12**0.5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["LongcatFlashNgramForCausalLM"]}, "LongCat-Flash-Lite"),
        ({"model_type": "longcat_flash_ngram"}, "'longcat_flash_ngram' is not supported"),
        ({"ngram_vocab_size_ratio": 78}, "ngram_vocab_size_ratio"),
        ({"oe_vocab_size_ratio": 78}, "oe_vocab_size_ratio"),
        ({"zero_expert_type": "drop"}, "zero_expert_type"),
        ({"router_bias": True}, "router_bias"),
        ({"attention_method": "LSA"}, "attention_method"),
        ({"norm_topk_prob": True}, "norm_topk_prob"),
        ({"index_topk": 8}, "index_topk"),
        ({"n_routed_experts": 0}, "n_routed_experts"),
        ({"moe_topk": 769}, "cannot choose 769 of 768 experts"),
        ({"num_layers": 10**30}, "num_layers"),
        ({"q_lora_rank": None}, "q_lora_rank"),
    ],
)
def test_what_is_another_model_is_refused_by_name(change: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_config(PUBLISHED | change)


def test_what_files_hold_beside_the_decoder_is_ignored_and_not_counted(folder: Path) -> None:
    expected = logits(load_model(folder))
    for keep in ("all", "published"):
        further = {
            "model.mtp.embed_tokens.weight": torch.ones(3, 4),
            "model.mtp.layers.0.eh_proj.weight": torch.ones(2, 2),
        }
        save_file(restored(folder, keep) | further, folder / "model.safetensors", metadata={"format": "pt"})
        assert torch.equal(logits(load_model(folder)), expected)
        facts = read_facts(folder)
        assert facts.problem is None
        assert facts.parameters_stored == facts.parameters == count_parameters(read_config(folder))
        assert facts.shortcut_layers == facts.moe_layers == 2


def test_an_expert_that_is_half_there_is_missed(folder: Path) -> None:
    tensors = restored(folder, "published")
    del tensors["model.layers.1.mlp.experts.2.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.3\.mlp\.experts\.2\.down_proj\.weight"):
        load_model(folder)


def test_what_is_saved_transformers_loads(folder: Path, tmp_path: Path) -> None:
    decoder = load_model(folder)
    save_pretrained(decoder, tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.inference_mode():
        torch.testing.assert_close(theirs(IDS).logits, logits(decoder), atol=1e-4, rtol=1e-4)
    again = load_model(tmp_path / "saved")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in decoder.state_dict().items())


def test_a_router_stays_what_the_files_hold(folder: Path, tmp_path: Path) -> None:
    exact, rounded = load_model(folder), load_model(folder, dtype=torch.bfloat16, packing=Packing())
    name = "model.layers.3.shortcut.gate.weight"
    assert torch.equal(rounded.get_parameter(name), exact.get_parameter(name))
    save_pretrained(exact, tmp_path / "saved", dtype=torch.bfloat16)
    assert torch.equal(load_model(tmp_path / "saved").get_parameter(name), exact.get_parameter(name))


@pytest.mark.parametrize("packing", [None, Packing()], ids=["plain", "packed"])
def test_the_cached_latent_is_scaled_and_rounded_once(folder: Path, packing: Packing | None) -> None:
    decoder = load_model(folder, dtype=torch.bfloat16, packing=packing)
    weight = load_file(folder / "model.safetensors")["model.layers.0.self_attn.0.kv_a_layernorm.weight"]
    attention = decoder.model.layers[0].self_attn
    cache = PagedCache(decoder.config.specs("bf16"), 2, page_size=16)
    batch = Batch.build([IDS[0, :9].tolist()], [0], [cache.pool.allocate(1)], page_size=16)
    with torch.inference_mode():
        x, positions = decoder.inputs(batch)
        x = decoder.model.layers[0].input_layernorm(x)
        attention.attend(x, positions, batch, cache.view(0))
        latent = attention.kv_a_proj_with_mqa(x)[:, :20].float()
    normed = (latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + 1e-6)).bfloat16()
    scaled = (normed.float() * (weight.bfloat16().float() * (48 / 20) ** 0.5)).bfloat16()
    cached = cache.view(0).pages.flatten(0, 1)[batch.slots, :20]
    # The mean may be summed in another order; the scale itself costs no rounding.
    assert (cached == scaled).float().mean() > 0.97
    torch.testing.assert_close(cached, scaled, atol=0, rtol=2**-7)


def test_a_shortcut_that_nothing_begins_is_refused() -> None:
    config: ModelConfig = read_config({"model_type": "longcat_flash", **LONGCAT})
    layer = DecoderLayer(config, config.layers[1], max_context=32)
    decoder = Decoder(config)
    with pytest.raises(ConfigError, match="in which one begins"):
        layer(torch.zeros(1, 3, 48), decoder.angles(3))
