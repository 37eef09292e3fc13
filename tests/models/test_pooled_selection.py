"""GLM-5.3-Flash: pools of tokens that are selected, wrappers, what transformers does not run, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families_for_tests import CASES, GLM5, TOWER, Case, save_checkpoint
from safetensors.torch import load_file, save_file
from test_parity import FOLDERS, IDS, TOLERANCE, error, reference, run
from transformers import Glm5NextForConditionalGeneration

from latentkv import ops
from latentkv.errors import CacheError, ConfigError
from latentkv.kernels import available_backends
from latentkv.models.batch import Batch, SlotUse
from latentkv.models.config import KDAConfig, LayerConfig
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.loading import load_model, save_pretrained
from latentkv.models.packing import Packing
from latentkv.ops import KVFormat
from latentkv.state import IndexSpec, LatentSpec, LayerSpec, PagedCache, RingSpec

POOLED = [case for case in CASES if case.model_type == "glm5_next"]
by_name = pytest.mark.parametrize("case", POOLED, ids=lambda case: case.name)
# Where no token past the last whole pool is read, the first tokens read none: only torch's own attention then gives 0.
WHOLE = Case("glm5-whole-pools", "glm5_next", GLM5 | {"index_kpool_always_select_tail": False}, attention="sdpa")
ATTENDING = Case(
    "glm5-attending",
    "glm5_next",
    GLM5
    | {
        "num_hidden_layers": 3,
        "layer_types": ["indexed_attention"] * 3,
        "indexer_types": ["full", "shared", "full"],
        "index_kpool": 8,
    },
)
OTHERS = {case.name: case for case in (WHOLE, ATTENDING)}
GLM = {"model_type": "glm5_next"}


@cache
def reference_of(name: str) -> tuple[Path, torch.Tensor]:
    """As `reference`, of the cases that are here alone."""
    case, folder = OTHERS[name], Path(FOLDERS.name) / name
    model = save_checkpoint(case, folder)
    with torch.inference_mode():
        return folder, model(torch.tensor([IDS])).logits[0]


@pytest.mark.thin(meet=1)
@pytest.mark.parametrize("form", ["absorbed", "expanded", None])
@pytest.mark.parametrize("name", OTHERS)
def test_other_ways_to_select_pools_give_transformers_logits(name: str, form: str | None) -> None:
    folder, expected = reference_of(name)
    decoder = load_model(folder)
    for lengths in ([37, *[1] * 32], [1, 68], [63, 6], [64, 1, 4]):
        assert error(run(decoder, lengths, form), expected) <= TOLERANCE
    with torch.inference_mode():
        whole = decoder.logits(decoder.forward_train(torch.tensor([IDS])))[0]
    assert error(whole, expected) <= TOLERANCE


@by_name
def test_no_selection_of_these_tests_hangs_on_rounding(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    gaps: list[torch.Tensor] = []
    best_tokens = ops.best_tokens

    def measured(scores: torch.Tensor, count: int) -> torch.Tensor:
        chooses = scores.isfinite().sum(-1) > count  # rows that see more pools than they read
        best = scores[chooses].topk(count + 1, dim=-1).values
        gaps.append((best[..., -2] - best[..., -1]) / scores[scores.isfinite()].abs().max())
        return best_tokens(scores, count)

    monkeypatch.setattr(ops, "best_tokens", measured)
    decoder = load_model(reference(case.name)[0])
    with torch.inference_mode():
        decoder.forward_train(torch.tensor([IDS]))
    assert len(gaps) == sum(layer.own_indexer is not None for layer in decoder.config.layers)
    assert float(torch.cat(gaps).min()) > 2e-6


def changed(folder: Path, to: Path, **changes: object) -> Path:
    """The checkpoint with another config."""
    for file in folder.glob("*.safetensors"):
        (to / file.name).symlink_to(file)
    (to / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))
    return to


def dense(decoder: Decoder) -> Decoder:
    """The same model without its indexers."""
    layers = tuple(replace(layer, indexer=None, shares_selection=False) for layer in decoder.config.layers)
    other = Decoder(replace(decoder.config, layers=layers)).eval()
    other.load_state_dict({name: t for name, t in decoder.state_dict().items() if ".indexer." not in name})
    return other


@by_name
@pytest.mark.parametrize("form", ["absorbed", "expanded", None])
def test_up_to_topk_tokens_give_the_bits_of_dense_attention(case: Case, form: Any, tmp_path: Path) -> None:
    decoder = load_model(changed(reference(case.name)[0], tmp_path, index_topk=40))
    pool = next(layer.indexer.pool for layer in decoder.config.layers if layer.indexer)
    whole = 40 + pool - 1  # with the pool that is open
    lengths = [20, whole - 22, 1, 1]
    assert torch.equal(run(decoder, lengths, form), run(dense(decoder), lengths, form))
    more = [*lengths, 1]
    assert not torch.allclose(run(decoder, more, form)[whole], run(dense(decoder), more, form)[whole], atol=1e-4)


@pytest.mark.skipif(len(available_backends()) == 1, reason="the native kernels were not built")
@pytest.mark.parametrize("kv_format", ["fp32", "bf16", "int8"])
def test_a_prompt_cut_anywhere_gives_the_same_bits(kv_format: KVFormat) -> None:
    dtype = torch.float32 if kv_format == "fp32" else torch.bfloat16
    decoder = load_model(
        reference("glm5-shared")[0], dtype=dtype, packing=None if dtype == torch.float32 else Packing()
    )

    def read(lengths: list[int]) -> torch.Tensor:
        cache = PagedCache(decoder.config.specs(kv_format), 5, page_size=16, num_slots=1)
        done, out = 0, list[torch.Tensor]()
        for length in lengths:
            use = [SlotUse(slot=0, pending=0, committed=length)]
            batch = Batch.build([IDS[done : done + length]], [done], [[4, 1, 3, 0, 2]], page_size=16, slots=use)
            out.append(decoder(batch, cache, form="absorbed"))
            done += length
        return torch.cat(out)

    with torch.inference_mode():
        whole = read([69])
        for lengths in ([1, 68], [63, 6], [64, 5], [65, 4], [2, 3, 5, 7, 11, 13, 17, 11], [1] * 69):
            pieces = read(lengths)
            if kv_format == "fp32":  # whose products of matrices are torch's
                torch.testing.assert_close(pieces, whole, atol=1e-4, rtol=1e-4)
            else:
                assert torch.equal(pieces, whole)


def test_a_wrapper_with_a_vision_tower_is_its_text_model(tmp_path: Path) -> None:
    folder, expected = reference("glm5")
    flat = json.loads((folder / "config.json").read_text())
    text = flat | {"model_type": "glm5_next_text"}
    wrapped = {"model_type": "glm5_next", "vision_config": TOWER, "text_config": text, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(wrapped))
    tensors = load_file(folder / "model.safetensors")
    assert any(name.startswith("model.visual.") for name in tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    nested = load_model(tmp_path)
    assert torch.equal(run(nested, [69]), run(load_model(folder), [69]))
    del wrapped["text_config"]["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(wrapped))
    assert error(run(load_model(tmp_path), [69]), expected) <= TOLERANCE
    # A text model alone, as everybody else's is stored.
    plain = {n.replace("language_model.", ""): t for n, t in tensors.items() if "visual" not in n}
    save_file(plain, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(flat))
    assert error(run(load_model(tmp_path), [69]), expected) <= TOLERANCE


@by_name
def test_what_is_saved_is_what_transformers_reads(case: Case, tmp_path: Path) -> None:
    folder, expected = reference(case.name)
    decoder = load_model(folder)
    save_pretrained(decoder, tmp_path)
    assert torch.equal(run(load_model(tmp_path), [69]), run(decoder, [69]))
    saved = json.loads((tmp_path / "config.json").read_text())
    tower = TOWER | {"out_hidden_size": 48}  # which is not ours to write
    (tmp_path / "config.json").write_text(json.dumps(saved | {"vision_config": tower}))
    model = Glm5NextForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        assert error(model(torch.tensor([IDS])).logits[0], expected) <= TOLERANCE


def test_the_module_that_predicts_further_tokens_is_left_out(tmp_path: Path) -> None:
    folder, expected = reference("glm5")
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.language_model.layers."
    module = {n.replace(f"{prefix}3.", f"{prefix}5."): t.clone() for n, t in tensors.items() if f"{prefix}3." in n}
    module[f"{prefix}5.eh_proj.weight"] = torch.randn(48, 96)
    module |= {f"{prefix}5.{name}.weight": torch.randn(48) for name in ("enorm", "hnorm", "shared_head.norm")}
    save_file(tensors | module, tmp_path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    decoder = load_model(tmp_path)
    assert not len(decoder.mtp) and decoder.config.num_mtp_layers == 0
    assert error(run(decoder, [69]), expected) <= TOLERANCE


def test_a_page_has_a_key_a_pool_and_a_ring_for_drafts() -> None:
    layer = read_config(GLM | {"index_kpool": 4}).layers[3]
    assert layer.spec("bf16", most_drafted=5) == LayerSpec(
        LatentSpec(512, 0, "bf16"), IndexSpec(128, torch.bfloat16, 4), ring=RingSpec(128, 9, torch.bfloat16)
    )
    spec = layer.spec("int8", most_drafted=5)
    assert spec.index == IndexSpec(128, torch.int8, 4) and spec.token_bytes == 512 + 10 + 6 + 132 // 4
    assert spec.kept_page_bytes(64) == 64 * 528 + 16 * 132
    assert spec.page_bytes(64) == spec.kept_page_bytes(64) + 9 * 2 * 128 * 2
    with pytest.raises(CacheError, match="whole number of pools of 4"):
        PagedCache([spec], 3, page_size=10)


def test_a_cache_without_rings_is_refused() -> None:
    decoder = load_model(reference_of(ATTENDING.name)[0])
    specs = [replace(spec, ring=None) for spec in decoder.config.specs("fp32")]
    batch = Batch.build([IDS[:3]], [0], [[0]], page_size=16)
    with pytest.raises(CacheError, match="rings"), torch.inference_mode():
        decoder(batch, PagedCache(specs, 1, page_size=16))


def kinds(layers: tuple[LayerConfig, ...]) -> str:
    return "".join(
        "k" if isinstance(layer.attention, KDAConfig) else "SF"[not layer.shares_selection] for layer in layers
    )


def test_which_layers_attend_and_which_share_a_selection() -> None:
    assert kinds(read_config(GLM).layers) == "kkkF" * 11 + "k"
    types = {"num_hidden_layers": 4, "layer_types": ["linear_attention", *["indexed_attention"] * 3]}
    assert kinds(read_config(GLM | types | {"indexer_types": ["shared", "full", "shared", "full"]}).layers) == "kFSF"
    assert kinds(read_config(GLM | types | {"index_topk_pattern": "FFSS"}).layers) == "kFSS"


def test_keys_of_a_nested_object_of_linear_layers_are_read() -> None:
    nested = {"head_dim": 64, "num_heads": 16, "short_conv_kernel_size": 4, "gate_lower_bound": -3.0}
    kda = KDAConfig(16, 64, 1e-5, -3.0, low_rank_gates=True)
    assert read_config(GLM | {"linear_attn_config": nested}).layers[0].attention == kda
    unbounded = nested | {"gate_lower_bound": None}
    assert read_config(GLM | {"linear_attn_config": unbounded}).layers[0].attention == replace(kda, lower_bound=-5.0)
    free = read_config(GLM | {"linear_attn_config": unbounded | {"safe_gate": False}}).layers[0].attention
    assert free == replace(kda, lower_bound=None)
    assert read_config(GLM | {"linear_lower_bound": None}).layers[0].attention.lower_bound is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"index_kpool": 3}, "index_kpool=3 must divide index_topk=2048"),
        ({"index_kpool": 128}, "64 tokens of a cache's page"),
        ({"index_kpool": 0}, "index_kpool"),
        ({"qk_rope_head_dim": 64, "index_head_dim": 128}, "qk_rope_head_dim=64"),
        ({"indexer_types": ["full"] * 3 + ["shared"] + ["full"] * 41}, "layer 3 is to share"),
        ({"linear_lower_bound": 2.0}, "linear_lower_bound"),
        ({"hc_mult": 17}, "hc_mult"),
        ({"hc_sinkhorn_iters": 0}, "hc_sinkhorn_iters"),
        ({"swiglu_limit": -1.0}, "swiglu_limit"),
        ({"q_lora_rank": None}, "q_lora_rank"),
        ({"layer_types": ["indexed_attention"] * 44}, "layer_types"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_config(GLM | change)


@pytest.mark.parametrize("key", ["hc_mult", "index_kpool", "swiglu_limit"])
def test_other_families_do_not_take_its_keys(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        read_config({"model_type": "deepseek_v3", key: 4})


def test_a_decoder_that_is_to_be_trained_learns_in_every_part_but_what_selects() -> None:
    torch.manual_seed(0)
    decoder = Decoder(read_config(GLM | GLM5)).train()
    decoder.logits(decoder.forward_train(torch.tensor([IDS[:20]]))).square().mean().backward()
    for name, parameter in decoder.named_parameters():
        selects = ".indexer." in name
        assert (parameter.grad is None) == selects, name
        assert selects or parameter.grad.abs().sum() > 0, name
