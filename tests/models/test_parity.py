"""Every family gives the logits that transformers gives for the same checkpoint, whichever way they are computed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from families_for_tests import CASES, FIRST_NAMES, VOCAB, Case, by_family, save_checkpoint, slow_but

from latentkv.models.batch import Batch, SlotUse
from latentkv.models.decoder import Decoder
from latentkv.models.loading import load_model
from latentkv.models.stored_config import open_checkpoint
from latentkv.state import PagedCache

PREFILL, STEPS, PAGE = 37, 32, 16
TOLERANCE = 1e-4  # of the largest logit

IDS = torch.randint(3, VOCAB, (PREFILL + STEPS,), generator=torch.Generator().manual_seed(1)).tolist()
MLA_CASES = [case for case in CASES if "kv_lora_rank" in case.config]
FOLDERS = TemporaryDirectory(prefix="latentkv-models-")  # removed when the process ends
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
by_family_mla = pytest.mark.parametrize("case", slow_but(MLA_CASES, FIRST_NAMES), ids=lambda case: case.name)


@cache
def reference(name: str) -> tuple[Path, torch.Tensor]:
    """The case's checkpoint folder and transformers' logits [T, V] for IDS."""
    folder = Path(FOLDERS.name) / name
    model = save_checkpoint(next(case for case in CASES if case.name == name), folder)
    with torch.inference_mode():
        return folder, model(torch.tensor([IDS])).logits[0]


def run(decoder: Decoder, lengths: list[int], form: str | None = None) -> torch.Tensor:
    """Logits of IDS fed through the cache in steps of the given lengths."""
    cache = PagedCache(decoder.config.specs("fp32"), num_pages=8, page_size=PAGE, num_slots=2)
    cache.pool.allocate(2)  # so that the sequence's pages do not begin at 0
    pages = cache.pool.allocate(cache.pages_for(len(IDS)))[::-1]
    logits, done = [], 0
    with torch.inference_mode():
        for length in lengths:
            slots = [SlotUse(slot=1, pending=0, committed=length)] if cache.num_slots else None
            batch = Batch.build([IDS[done : done + length]], [done], [pages], page_size=PAGE, slots=slots)
            logits.append(decoder.logits(decoder(batch, cache, form=form)))
            done += length
    return torch.cat(logits)


def error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a fraction of the largest logit."""
    return float((logits - expected).abs().max() / expected.abs().max())


STEPWISE = [PREFILL] + [1] * STEPS
PART_STEPWISE = [PREFILL] + [1] * 12 + [STEPS - 12]
"""Over a page's end, and of the rest in one step: enough where the form is given, whatever the step's length."""


@by_name
def test_prefill_and_decode_through_the_cache_give_transformers_logits(case: Case) -> None:
    folder, expected = reference(case.name)
    logits = run(load_model(folder), STEPWISE)
    assert error(logits, expected) <= TOLERANCE
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@by_family_mla
@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_each_form_gives_transformers_logits(case: Case, form: str) -> None:
    folder, expected = reference(case.name)
    logits = run(load_model(folder), PART_STEPWISE, form)
    assert error(logits, expected) <= TOLERANCE
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@by_family_mla
def test_expansion_in_small_chunks_over_a_chunked_prefill_gives_transformers_logits(case: Case) -> None:
    folder, expected = reference(case.name)
    decoder = load_model(folder)
    for layer in decoder.model.layers:
        layer.self_attn.expand_chunk = 7
    logits = run(decoder, [20, 17, 1, 9, 1, 21], "expanded")
    assert error(logits, expected) <= TOLERANCE
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@by_family
def test_whole_sequences_without_a_cache_give_transformers_logits(case: Case) -> None:
    folder, expected = reference(case.name)
    decoder = load_model(folder)
    with torch.inference_mode():
        logits = decoder.logits(decoder.forward_train(torch.tensor([IDS])))[0]
    assert error(logits, expected) <= TOLERANCE


@by_family
def test_changing_any_tensor_changes_the_logits_beyond_the_tolerance(case: Case) -> None:
    folder, expected = reference(case.name)
    decoder = load_model(folder)
    generator = torch.Generator().manual_seed(2)
    slopes = _slopes(decoder, torch.randn(expected.shape, generator=generator))
    for name, tensor in decoder.state_dict().items():
        # What a change of 0.05 in its elements comes to, to first order. What decides a choice has to be tried.
        if 0.05 * slopes.get(name, 0.0) > TOLERANCE * expected.abs().max():
            continue
        saved = tensor.clone()
        tensor += torch.randn(tensor.shape, generator=generator) * 0.05
        with torch.inference_mode():
            logits = decoder.logits(decoder.forward_train(torch.tensor([IDS])))[0]
        tensor.copy_(saved)
        assert error(logits, expected) > TOLERANCE, name


def _slopes(decoder: Decoder, direction: torch.Tensor) -> dict[str, float]:
    """How steeply the logits, along a direction that counts each about once, rise with each parameter."""
    decoder.requires_grad_(True)
    logits = decoder.logits(decoder.forward_train(torch.tensor([IDS])))[0]
    (logits * direction).sum().div(direction.numel() ** 0.5).backward()
    return {name: float(p.grad.norm()) for name, p in decoder.named_parameters() if p.grad is not None}


MOE_CHANGES = {
    "norm_topk_prob": None,
    "moe_renormalize": None,
    "routed_scaling_factor": 1.1,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
}
CHANGES = {
    "rms_norm_eps": 0.05,
    "rope_interleave": None,
    "scale_emb": 3,
    "scale_depth": 0.7,
    "dim_model_base": 31,
    "sliding_window": 11,
    "index_topk": 9,
    "kda_safe_gate": None,
    "kda_lower_bound": -3.0,
    "linear_lower_bound": -3.0,
    "swiglu_limit": 0.7,
    "hc_sinkhorn_iters": 1,
    "index_kpool_always_select_tail": None,
    "mla_scale_q_lora": None,
    "mla_scale_kv_lora": None,
    "hc_eps": 0.3,
    "hc_magnitude": 1.0,
}
ROPE_CHANGES = {
    "factor": 5.0,
    "original_max_position_embeddings": 40,
    "beta_fast": 0.1,
    "beta_slow": 0.5,
    "mscale": 0.2,
    "mscale_all_dim": 0.3,
    "llama_4_scaling_beta": 0.01,
    "low_freq_factor": 0.4,
    "high_freq_factor": 9.0,
    "long_factor": [1.0, 1.5, 2.0, 2.5],
    "rope_theta": 3000.0,
    "partial_rotary_factor": 0.25,
}
# Without scaling, only theta counts; each kind of scaling reads its own fields.
ROPE_FIELDS = {
    "default": {"rope_theta", "partial_rotary_factor"},
    "linear": {"rope_theta", "factor"},
    "longrope": {"rope_theta", "factor", "long_factor"},
}


@by_family
def test_changing_any_meaningful_config_field_changes_the_logits(case: Case, tmp_path: Path) -> None:
    folder, expected = reference(case.name)
    saved, loaded = json.loads((folder / "config.json").read_text()), load_model(folder)
    weights = loaded.state_dict()  # read once: they are the same whatever the config says
    for file in folder.glob("*.safetensors"):
        (tmp_path / file.name).symlink_to(file)
    for change in [{}, *_changes(saved, moe=loaded.config.moe is not None)]:
        (tmp_path / "config.json").write_text(json.dumps(saved | change))
        decoder = Decoder(open_checkpoint(tmp_path)[0]).eval()
        decoder.drop_mtp_modules(keep=range(len(loaded.mtp)))
        decoder.load_state_dict(weights)
        with torch.inference_mode():
            logits = decoder.logits(decoder.forward_train(torch.tensor([IDS])))[0]
        assert (error(logits, expected) > TOLERANCE) == bool(change), change


def _changes(saved: dict[str, Any], *, moe: bool) -> Iterator[dict[str, Any]]:
    """One changed field at a time, of those that this family reads (a value of None here: the opposite)."""
    unread = {
        "deepseek_v2": {"norm_topk_prob", "rope_interleave"},
        "mistral4": {"partial_rotary_factor"},  # follows from the sizes of its heads
    }.get(saved["model_type"], set())
    if saved.get("kda_safe_gate") is False:
        unread = unread | {"kda_lower_bound"}
    pool = saved.get("index_kpool")
    for key, value in (CHANGES | (MOE_CHANGES if moe else {}) | ({"index_topk": pool} if pool else {})).items():
        if saved.get(key) is not None and key not in unread:
            yield {key: not saved[key] if value is None else value}
    rope = saved.get("rope_parameters", {"rope_type": "default"})
    read = ROPE_FIELDS.get(rope["rope_type"], ROPE_CHANGES.keys()) - unread
    for key in rope.keys() & ROPE_CHANGES.keys() & read:
        yield {"rope_parameters": rope | {key: ROPE_CHANGES[key]}}
