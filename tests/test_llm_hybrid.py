"""`LLM` of models with recurrent layers: what is shared, drafted, stored and scored changes no token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latentkv import LLM, SamplingParams
from latentkv.errors import CacheError
from stored_models import GREEDY, MLA, PROMPT, write_model

_LINEAR = {key: value for key, value in MLA.items() if key != "architectures"} | {"n_group": 2, "head_dim": 16}
MODELS = {
    "bailing": _LINEAR | {"model_type": "bailing_hybrid", "layer_group_size": 2, "num_nextn_predict_layers": 1},
    "kimi": _LINEAR
    | {
        "model_type": "kimi_linear",
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_heads": 2,
        "linear_head_dim": 16,
    },
    "glm5": _LINEAR
    | {
        "model_type": "glm5_next_text",
        "layer_types": ["linear_attention", "indexed_attention"],
        "q_lora_rank": 24,
        "qk_rope_head_dim": 0,
        "linear_num_heads": 2,
        "linear_head_dim": 16,
        "index_topk": 64,
        "index_kpool": 4,
        "index_head_dim": 16,
        "index_n_heads": 4,
        "hc_mult": 2,
    },
}
MODELS["ling25"] = MODELS["bailing"] | {
    "architectures": ["BailingMoeV2_5ForCausalLM"],
    "head_dim": 32,
    "group_norm_size": 2,
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / request.param, MODELS[request.param])


def said(llm: LLM, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    return llm.generate(prompt, params)[0].token_ids


def test_what_is_shared_drafted_and_stored_changes_no_token(folder: Path, tmp_path: Path):
    plain = LLM(folder)
    expected = said(plain, PROMPT)
    draft = "mtp" if plain.config.num_mtp_layers else "ngram"
    first = LLM(folder, speculate=3, draft=draft, cache_dir=tmp_path)
    assert said(first, PROMPT) == expected
    assert said(first, PROMPT) == expected and first.engine.counters.prefix_hits == 256
    first.close()
    second = LLM(folder, speculate=3, draft=draft, cache_dir=tmp_path)
    assert said(second, PROMPT) == expected and second.engine.counters.store_hits == 256
    second.close()


def test_the_next_turn_reads_only_what_is_new(folder: Path):
    llm, fresh = LLM(folder), LLM(folder)
    params = SamplingParams(max_tokens=90, temperature=0, ignore_eos=True)
    turn = [*PROMPT[:100], *said(llm, PROMPT[:100], params)]
    assert said(llm, [*turn, 7, 8]) == said(fresh, [*turn, 7, 8])
    assert (llm.engine.counters.prefix_hits, fresh.engine.counters.prefix_hits) == (128, 0)


def test_texts_are_read_and_small_caches_say_what_they_need(folder: Path):
    llm = LLM(folder)
    assert llm.cache.num_slots >= 4 and llm.cache.num_pages * 64 >= llm.max_context
    least = llm.cache.page_bytes + llm.cache.sequence_bytes
    with pytest.raises(CacheError, match=f"at least {least:,}"):
        LLM(folder, kv_cache_bytes=least - 1)
    small = LLM(folder, kv_cache_bytes=least + 3 * llm.cache.page_bytes)
    assert small.cache.num_slots >= 1 and small.cache.num_pages >= 2
    torch.testing.assert_close(small.logits(PROMPT[:100]), llm.logits(PROMPT[:100]))
