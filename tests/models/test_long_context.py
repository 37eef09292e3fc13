"""128K tokens of real text through a paged bf16 cache: exact, and in the bytes that `plan` predicts."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from latentkv import ops
from latentkv.models.batch import Batch, SlotUse
from latentkv.models.config import ModelConfig
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.mla import MultiHeadLatentAttention
from latentkv.ops import reference
from latentkv.plan import make_plan
from latentkv.state import PagedCache
from latentkv.text.bpe_trainer import train_bpe

CONTEXT, STEPS, CHUNK, PAGES = 131_072, 32, 4096, 2048
CONFIG = {
    "model_type": "deepseek_v3",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 2,
    "num_attention_heads": 3,
    "q_lora_rank": 48,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 32,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
BOOKS = Path(os.environ.get("LATENTKV_DATA", Path(__file__).parents[3] / "shared" / "data")) / "books"


def book_tokens() -> list[int]:
    """The first 131,072 tokens of the books, in a tokenizer made of the first of them."""
    books = sorted(BOOKS.glob("*.txt"))
    tokenizer = train_bpe([books[0].read_text(encoding="utf-8")], CONFIG["vocab_size"])
    ids: list[int] = []
    for book in books:
        ids += tokenizer.encode(book.read_text(encoding="utf-8"), add_special_tokens=False).ids
        if len(ids) >= CONTEXT:
            return ids[:CONTEXT]
    raise AssertionError(f"{BOOKS} holds only {len(ids)} tokens")


def loaded(config: ModelConfig) -> tuple[Decoder, PagedCache]:
    """A random model, and room for the whole text."""
    torch.manual_seed(0)
    decoder = Decoder(config).to(torch.bfloat16).eval()
    decoder.keep_choices_exact()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 2:  # scores with a spread that makes the softmax choose
                parameter.mul_(3)
    return decoder, PagedCache(config.specs("bf16"), PAGES)


@pytest.mark.slow
@pytest.mark.skipif(not BOOKS.is_dir(), reason=f"no books at {BOOKS}; set LATENTKV_DATA to the folder that holds them")
def test_128k_tokens_of_text_are_exact_and_cost_what_plan_says() -> None:
    config = read_config(CONFIG)
    decoder, cache = loaded(config)
    (predicted,) = (
        row.cache_bytes for row in make_plan("it", config, memory=(), context=CONTEXT).cache if row.this_model
    )
    assert cache.allocated_bytes == predicted == PAGES * 64 * cache.bytes_per_token

    ids, pages = book_tokens(), cache.pool.allocate(PAGES)

    def step(begin: int, end: int) -> torch.Tensor:
        return decoder(Batch.build([ids[begin:end]], [begin], [pages], page_size=64), cache)

    last = (CONTEXT - STEPS) // CHUNK * CHUNK
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        for start in range(0, last, CHUNK):
            step(start, start + CHUNK)
        prefilled = record(patch, MultiHeadLatentAttention, "_attend_expanded")
        step(last, CONTEXT - STEPS)
        for layer, ((module, q_nope, q_rope, *_), out) in enumerate(prefilled):
            assert module is decoder.model.layers[layer].self_attn
            for row in (0, 1000, len(out) - 1):
                q = torch.cat([q_nope, q_rope], dim=-1)[row]
                _check_prefilled(module, q, out[row], cache.view(layer), pages, last + row + 1)
        assert len(prefilled) == config.num_layers
        decoded = record(patch, ops, "mla_attend")
        for index in range(CONTEXT - STEPS, CONTEXT):
            decoded.clear()
            assert torch.isfinite(decoder.logits(step(index, index + 1))).all()
            assert len(decoded) == config.num_layers
            for layer, ((q, *_), (out, lse)) in enumerate(decoded):
                _check_decoded(decoder.model.layers[layer].self_attn, q, out, lse, cache.view(layer), pages, index + 1)


@pytest.mark.slow
@pytest.mark.skipif(not BOOKS.is_dir(), reason=f"no books at {BOOKS}; set LATENTKV_DATA to the folder that holds them")
def test_of_128k_tokens_of_text_sparse_attention_reads_the_best_and_is_exact() -> None:
    topk = 512
    index = {"index_topk": topk, "index_n_heads": 8, "index_head_dim": 16}
    config = read_config(CONFIG | index | {"model_type": "deepseek_v32"})
    decoder, cache = loaded(config)
    ids, pages = book_tokens(), cache.pool.allocate(PAGES)
    last = (CONTEXT - STEPS) // CHUNK * CHUNK
    bounds = [*range(0, last + 1, CHUNK), *range(CONTEXT - STEPS, CONTEXT + 1)]
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        chosen, attended = record(patch, ops, "select_slots"), record(patch, ops, "mla_attend")
        for begin, end in pairwise(bounds):
            chosen.clear()
            attended.clear()
            decoder(Batch.build([ids[begin:end]], [begin], [pages], page_size=64), cache)
            if begin < last:
                continue
            assert len(chosen) == len(attended) == config.num_layers
            for layer, ((scored, slots), ((q, *_), (out, lse))) in enumerate(zip(chosen, attended, strict=True)):
                module, state = decoder.model.layers[layer].self_attn, cache.view(layer)
                for row in {0, (end - begin) // 2, end - begin - 1}:
                    own = slots[row].long()
                    _check_chosen(*(t[row] for t in scored[:2]), state, pages, begin + row + 1, own)
                    cached = state.pages.flatten(0, 1)[own].double()
                    scores = q[row].double() @ cached.T * module.scale
                    _assert_close(out[row], scores.softmax(-1) @ cached[:, : module.config.kv_lora_rank])
                    torch.testing.assert_close(lse[row].double(), scores.logsumexp(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not BOOKS.is_dir(), reason=f"no books at {BOOKS}; set LATENTKV_DATA to the folder that holds them")
def test_of_128k_tokens_of_text_recurrent_states_forget_exactly_what_they_should() -> None:
    hybrid = {"model_type": "bailing_hybrid", "num_hidden_layers": 4, "layer_group_size": 4, "head_dim": 16}
    config = read_config({key: value for key, value in CONFIG.items() if key != "rope_scaling"} | hybrid)
    decoder, _ = loaded(config)
    cache = PagedCache(config.specs("bf16"), PAGES, num_slots=1)
    ids, pages = book_tokens(), cache.pool.allocate(PAGES)
    last = (CONTEXT - STEPS) // CHUNK * CHUNK
    bounds = [*range(0, last + 1, CHUNK), *range(CONTEXT - STEPS, CONTEXT + 1)]
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        recurred, attended = record(patch, ops, "kda_attend"), record(patch, ops, "mla_attend")
        for begin, end in pairwise(bounds):
            attended.clear()
            slots = [SlotUse(slot=0, pending=0, committed=end - begin)]
            decoder(Batch.build([ids[begin:end]], [begin], [pages], page_size=64, slots=slots), cache)
            if end - begin == 1:
                ((q, *_), (out, lse)), attention = attended[0], decoder.model.layers[3].self_attn
                _check_decoded(attention, q, out, lse, cache.view(3), pages, end)
        for layer in range(3):
            calls = recurred[layer::3]
            assert len(calls) == len(bounds) - 1
            *_, weights, state = calls[-1][0]
            inputs = [torch.cat(parts) for parts in zip(*(args[:4] for args, _ in calls), strict=True)]
            out = torch.cat([result for _, result in calls]).double()
            expected, matrices = reference.kda(
                *inputs,
                **weights._asdict(),
                matrices=torch.zeros_like(state.matrices[0]),
                past=torch.zeros_like(state.conv[0]),
            )
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=2**-8)
            torch.testing.assert_close(state.matrices[0].double(), matrices, atol=2e-6, rtol=1e-5)


def _check_chosen(q: Any, weights: Any, state: Any, pages: list[int], length: int, slots: Any) -> None:
    """The slots of one row hold the tokens of the best scores in float64, but for what float32 sums round."""
    keys = state.index_keys[torch.tensor(pages)].flatten(0, 1)[:length]
    scores = reference.index_scores(q, weights, keys)
    places = {page: index for index, page in enumerate(pages)}
    tokens = torch.tensor([places[slot // 64] * 64 + slot % 64 for slot in slots.tolist()])
    assert (tokens.diff() > 0).all()
    assert int(tokens[-1]) < length
    left_out = torch.ones(length, dtype=torch.bool).index_fill(0, tokens, False)
    assert scores[tokens].min() >= scores[left_out].max() - 1e-5 * scores.abs().max()


def record(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, Any]]:
    """Let every call of owner.name through, and keep its positional arguments and result."""
    calls: list[tuple[Any, Any]] = []
    original = getattr(owner, name)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        calls.append((args, result))
        return result

    patch.setattr(owner, name, recorded)
    return calls


def _check_prefilled(module: Any, q: Any, out: Any, state: Any, pages: list[int], length: int) -> None:
    """One prefilled row [H, Dv] against softmax over the expanded cache in float64."""
    table = torch.tensor(pages, dtype=torch.int32)
    keys, values = module._expand_cached(table, state, 0, length, torch.bfloat16)
    scores = torch.einsum("hd,shd->hs", q.double(), keys.double()) * module.scale
    _assert_close(out, torch.einsum("hs,shd->hd", scores.softmax(-1), values.double()))


def _check_decoded(module: Any, q: Any, out: Any, lse: Any, state: Any, pages: list[int], length: int) -> None:
    """One decoded row [1, H, L] against softmax over the cached values in float64."""
    latent_dim, rope_dim = module.config.kv_lora_rank, module.config.qk_rope_head_dim
    cached = ops.read_latents(
        state.pages, pages, 0, length, latent_dim=latent_dim, rope_dim=rope_dim, kv_format="bf16", dtype=torch.float64
    )
    scores = q[0].double() @ cached.T * module.scale
    _assert_close(out[0], scores.softmax(-1) @ cached[:, :latent_dim])
    expected = scores.logsumexp(-1)
    error = (lse[0].double() - expected).abs()
    assert ((error <= 1e-6) | (error <= expected.abs() * 8.01 / 65536)).all()


def _assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    """FlashMLA's tolerances."""
    got = out.double()
    error = (got - expected).abs()
    assert ((error <= 8e-4) | (error <= expected.abs() * 2.01 / 128)).all()
    assert 1 - 2 * (got * expected).sum() / (got.square() + expected.square()).sum() <= 5e-6
