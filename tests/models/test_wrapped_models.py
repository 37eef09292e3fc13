"""Models that differ from a family by names alone: inside wrappers, behind prefixes, with other keys of config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from families_for_tests import MLA, MOE, VOCAB
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel

from latentkv.models.batch import Batch
from latentkv.models.config import GQAConfig
from latentkv.models.decoder import Decoder
from latentkv.models.loading import load_model, save_pretrained
from latentkv.state import PagedCache

IDS = torch.randint(3, VOCAB, (24,), generator=torch.Generator().manual_seed(3)).tolist()
PAGE = 16
V3 = MLA | MOE | {"model_type": "deepseek_v3", "num_nextn_predict_layers": 0, "tie_word_embeddings": False}
V2 = V3 | {"model_type": "deepseek_v2", "norm_topk_prob": False, "topk_method": "greedy", "q_lora_rank": None}
VISION = {"vision.blocks.0.attn.qkv.weight": torch.zeros(4, 4), "projector.layers.0.weight": torch.zeros(4, 4)}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def transformers_model(config: Mapping[str, Any], folder: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors under their published names, and the logits [T, V] of IDS, of a random model of transformers."""
    from safetensors.torch import load_file

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.2, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    with torch.inference_mode():
        return load_file(folder / "model.safetensors"), model.eval()(torch.tensor([IDS])).logits[0]


def stored(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def run(decoder: Decoder) -> torch.Tensor:
    """Logits of IDS: a prompt of 20 tokens, then one at a time."""
    cache = PagedCache(decoder.config.specs("fp32"), num_pages=4, page_size=PAGE)
    pages = cache.pool.allocate(cache.pages_for(len(IDS)))
    logits, done = [], 0
    with torch.inference_mode():
        for length in (20, 1, 1, 1, 1):
            batch = Batch.build([IDS[done : done + length]], [done], [pages], page_size=PAGE)
            logits.append(decoder.logits(decoder(batch, cache)))
            done += length
    return torch.cat(logits)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize(
    "nested",
    [
        lambda text: {"model_type": "deepseek_vl_v2", "language_config": text, "vision_config": {}},
        lambda text: {"model_type": "anything", "llm_config": text, "vision_config": {"hidden_size": 8}},
        lambda text: {"model_type": "any_omni", "thinker_config": {"text_config": text, "audio_config": {}}},
        lambda text: {"model_type": "novel", "decoder_config": text, "vision_config": {"hidden_size": 8}},
    ],
    ids=["language_config", "llm_config", "thinker", "unknown key"],
)
def test_a_text_model_is_found_wherever_a_wrapper_nests_it(tmp_path: Path, nested: Any) -> None:
    tensors, expected = transformers_model(V2, tmp_path)
    renamed = {f"language.{name}": tensor for name, tensor in tensors.items()} | VISION
    assert_close(run(load_model(stored(tmp_path / "m", nested(V2), renamed), dtype=torch.float32)), expected)


def test_a_wrapper_that_names_no_inner_type_has_the_one_of_its_kind(tmp_path: Path) -> None:
    tensors, expected = transformers_model(V3, tmp_path)
    text = {key: value for key, value in V3.items() if key not in ("model_type", "tie_word_embeddings")}
    renamed = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    renamed |= {
        "vision_tower.encoder.layers.0.mlp.x.weight": torch.zeros(2, 2),
        "mm_projector.x": torch.ones(1),
    }
    folder = stored(tmp_path / "m", {"model_type": "kimi_k25", "text_config": text}, renamed)
    decoder = load_model(folder, dtype=torch.float32)
    assert not decoder.config.tie_word_embeddings  # transformers' class would tie; the files hold a head of its own
    assert_close(run(decoder), expected)


@pytest.mark.parametrize(
    "prefix", ["", "transformer.", "base_model.model.model.", "module.model.", "_orig_mod.model.", "a.b.c."]
)
def test_whatever_stands_before_all_names_is_taken_off(tmp_path: Path, prefix: str) -> None:
    tensors, expected = transformers_model(V3, tmp_path)
    head = prefix.removesuffix("model.")
    renamed = {
        prefix + name.removeprefix("model.") if name.startswith("model.") else head + name: tensor
        for name, tensor in tensors.items()
    }
    assert_close(run(load_model(stored(tmp_path / "m", V3, renamed), dtype=torch.float32)), expected)


def test_deepseek_vl2_routes_as_deepseek_v3(tmp_path: Path) -> None:
    v3 = V3 | {"q_lora_rank": None, "rope_interleave": True}
    tensors, expected = transformers_model(v3, tmp_path)
    vl2 = v3 | {"model_type": "deepseek_v2", "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    vl2["norm_topk_prob"] = True
    assert_close(run(load_model(stored(tmp_path / "m", vl2, tensors), dtype=torch.float32)), expected)


def test_sarvam_is_deepseek_v3_with_other_keys(tmp_path: Path) -> None:
    v3 = V3 | {"q_lora_rank": None, "n_group": 2, "topk_group": 1}
    tensors, expected = transformers_model(v3, tmp_path)
    sarvam = v3 | {"model_type": "sarvam_mla", "moe_router_enable_expert_bias": True, "use_qk_norm": True}
    sarvam["num_experts"], sarvam["num_shared_experts"] = sarvam.pop("n_routed_experts"), sarvam.pop("n_shared_experts")
    folder = stored(tmp_path / "m", sarvam, tensors)
    decoder = load_model(folder, dtype=torch.float32)
    assert_close(run(decoder), expected)
    save_pretrained(decoder, tmp_path / "saved")
    assert_close(run(load_model(tmp_path / "saved")), expected)


OCR = {
    **{key: V2[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
    **{"num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 128, **MOE},
    **{
        "tie_word_embeddings": False,
        "topk_method": "greedy",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_theta": 100.0,
    },
}


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("written_by", ["DeepSeek", "transformers"])
def test_without_mla_a_deepseek_model_has_llamas_attention(tmp_path: Path, written_by: str, kv_heads: int) -> None:
    text = OCR | {"num_key_value_heads": kv_heads}
    kinds = ["dense", "sparse", "sparse"]
    their_config = AutoConfig.for_model(
        "deepseek_ocr2_text", **text, mlp_layer_types=kinds, attn_implementation="eager"
    )
    model, head = randomised(DeepseekOcr2TextModel(their_config)), torch.randn(VOCAB, 48) * 0.2
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).last_hidden_state[0] @ head.T
    tensors = {f"model.language_model.{name}": tensor for name, tensor in model.state_dict().items()}
    if written_by == "DeepSeek":
        text |= {"model_type": "deepseek_v2", "use_mla": False, "kv_lora_rank": None, "q_lora_rank": None}
        text |= {"qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0}
        config = {"model_type": "deepseek_vl_v2", "language_config": text, "vision_config": {}, **text}
        tensors = {name.replace("language_model.", ""): tensor for name, tensor in tensors.items()}
        tensors |= {"model.sam_model.blocks.0.x": torch.ones(1), "model.image_newline": torch.ones(4)}
    else:
        config = {"model_type": "deepseek_ocr2", "text_config": text | {"mlp_layer_types": kinds}}
        tensors |= {"model.vision_tower.x": torch.ones(2)}
    folder = stored(tmp_path / "m", config, tensors | {"lm_head.weight": head})
    decoder = load_model(folder, dtype=torch.float32)
    assert decoder.config.attention == GQAConfig(kv_heads, 8)
    assert_close(run(decoder), expected)
    save_pretrained(decoder, tmp_path / "saved")
    assert_close(run(load_model(tmp_path / "saved")), expected)
