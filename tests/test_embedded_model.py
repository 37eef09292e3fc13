"""The model inside the package: what its card promises."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from latentkv import LLM, SamplingParams
from latentkv.llm_options import EMBEDDED_MODEL
from latentkv.plan import make_plan

DATA = Path(os.environ.get("LATENTKV_DATA", Path(__file__).parents[2] / "shared" / "data"))
HELD_OUT = ("dracula.txt", "middlemarch.txt")
needs_books = pytest.mark.skipif(
    not (DATA / "books").is_dir(), reason=f"no books at {DATA}; set LATENTKV_DATA to the folder that holds them"
)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(kv_cache_bytes=16 * 2**20)


def test_it_is_a_sparse_mla_model_with_one_mtp_module_in_25_megabytes(llm: LLM) -> None:
    config = llm.config
    assert config.moe is not None
    assert 0 < config.moe.experts_per_token < config.moe.num_experts
    assert config.moe.num_shared_experts == 1
    assert (config.rope.kind, len(llm.decoder.mtp)) == ("yarn", 1)
    assert (EMBEDDED_MODEL / "model.safetensors").stat().st_size <= 25_000_000


def test_its_cache_is_a_sixteenth_of_the_same_models_mha(llm: LLM) -> None:
    own, mha, *_ = make_plan("embedded", llm.config, memory=()).cache
    assert own.this_model and mha.attention == "MHA"
    assert own.bytes_per_token == llm.cache.bytes_per_token
    assert 16 * own.bytes_per_token <= mha.bytes_per_token


def test_it_writes_words_from_its_training_books(llm: LLM) -> None:
    (completion,) = llm.generate("It was a dark night, and", SamplingParams(max_tokens=60, temperature=0.7, seed=1))
    words = [word.strip(".,;:!?\"'-_()").lower() for word in completion.text.split()]
    common = {
        "the",
        "and",
        "of",
        "to",
        "a",
        "i",
        "in",
        "was",
        "he",
        "that",
        "it",
        "his",
        "had",
        "with",
        "as",
        "for",
        "her",
    }
    assert len(words) >= 25
    assert sum(word in common for word in words) >= len(words) / 6


def test_transformers_loads_it_and_gives_the_same_logits(llm: LLM) -> None:
    ids = llm.tokenizer.encode("The carriage stopped before the gate of the old house.", add_bos=True)
    theirs = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    ours = LLM(dtype="fp32", kv_cache_bytes=2**20)
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0]
    assert float((ours.logits(ids) - expected).abs().max() / expected.abs().max()) <= 1e-4


@needs_books
@pytest.mark.parametrize("name", HELD_OUT)
def test_novels_that_it_has_not_seen_cost_at_most_1_75_bits_a_byte(llm: LLM, name: str) -> None:
    text = (DATA / "books" / name).read_text(encoding="utf-8")
    begin = len(text) // 2
    assert llm.perplexity(text[begin : begin + 8_000]).bits_per_byte <= 1.75


@pytest.mark.slow
@needs_books
@pytest.mark.parametrize("name", HELD_OUT)
def test_the_card_states_the_measured_bits_a_byte(llm: LLM, name: str) -> None:
    evaluation = json.loads((EMBEDDED_MODEL / "evaluation.json").read_text())
    text = (DATA / "books" / name).read_text(encoding="utf-8")
    measured = llm.perplexity(text[len(text) // 2 :][: evaluation["characters"]]).bits_per_byte
    assert measured == pytest.approx(evaluation["bits_per_byte"][name], abs=0.002)
    assert measured <= 1.75


@needs_books
def test_the_held_out_novels_were_in_neither_training_nor_tokenizer() -> None:
    for phase in ("phase1", "phase2"):
        recipe = json.loads((EMBEDDED_MODEL / "training" / f"{phase}.json").read_text())
        assert set(recipe["data"]["excluded"]) == set(HELD_OUT)
        assert recipe["data"]["documents"] == len(list((DATA / "books").glob("*.txt"))) - len(HELD_OUT)
