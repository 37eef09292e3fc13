"""A model cut into stages in several processes gives the tokens of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_models import BAILING, HY4, KIMI, MLA, SPARSE
from latentkv import LLM, SamplingParams
from latentkv.engine.pace import Pace
from latentkv.kernels import available_backends
from latentkv.state import pages_and_slots
from rank_programs import BEGIN, Task, Turn, generate, ranks_of
from stored_models import write_model

LAYERS = {"num_hidden_layers": 4, "max_position_embeddings": 1024}
LOW_RANK = {**MLA, **LAYERS, "q_lora_rank": 24}
MODELS: dict[str, dict[str, Any]] = {
    "v2": {
        **MLA,
        **LAYERS,
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "topk_method": "group_limited_greedy",
        "norm_topk_prob": False,
        "n_group": 2,
        "topk_group": 1,
    },
    "v3 with groups": {**LOW_RANK, "n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 1},
    "glm": {**LOW_RANK, "model_type": "glm4_moe_lite", "architectures": ["Glm4MoeLiteForCausalLM"]},
    "minicpm3": {
        **LOW_RANK,
        "model_type": "minicpm3",
        "architectures": ["MiniCPM3ForCausalLM"],
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 16,
        "tie_word_embeddings": True,
    },
    "axk1": {**LOW_RANK, "model_type": "axk1", "architectures": ["AXK1ForCausalLM"]},
    "sparse": {**SPARSE, **LAYERS},
    "hybrid": {**BAILING, **LAYERS},
    "kimi": {**KIMI, **LAYERS, "layer_types": ["linear_attention", "full_attention"] * 2},
    "streams": {**HY4, **LAYERS, "indexer_types": ["full", "shared"] * 2},
}


def prompt(length: int, seed: int = 0) -> list[int]:
    return [3 + (7 * i + i // 5 + seed) % 57 for i in range(length)]


def greedy(tokens: int = 12) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)


def seeded(seed: int, tokens: int = 12) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=1, seed=seed, ignore_eos=True)


TURNS: list[Turn] = [
    [(prompt(300), greedy()), (prompt(5, 1), seeded(3)), (prompt(70, 2), seeded(4, 20)), (prompt(1, 9), greedy(30))],
    [([*prompt(300), 7, 8], greedy()), (prompt(64), seeded(5))],  # these begin with what is cached
]
FLOAT32: dict[str, Any] = {"dtype": "fp32", "rank_timeout": 30}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where each model is, written when it is first asked for."""

    class Folders(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = write_model(tmp_path_factory.mktemp("model") / "m", MODELS[name])
            return self[name]

    return Folders()


def in_one_process(task: Task) -> dict[str, Any]:
    llm = LLM(task.folder, **task.options)
    if task.chunk:
        llm.thread.call(lambda: setattr(llm.engine, "_pace", Pace(task.chunk, None)))
    tokens: list[list[int]] = []
    for turn in task.turns:
        tokens += [each.token_ids for each in llm.generate([ids for ids, _ in turn], [params for _, params in turn])]
    logits = llm.logits(task.scored) if task.scored else None
    return {"tokens": tokens, "logits": logits, "cache_bytes": llm.cache.allocated_bytes, "llm": llm}


def assert_like_one_process(size: int, task: Task) -> list[dict[str, Any]]:
    one, ranks = in_one_process(task), generate(size, task)
    assert ranks[0]["tokens"] == one["tokens"]
    if task.scored:
        assert torch.equal(torch.tensor(ranks[0]["logits"], dtype=torch.float64).float(), one["logits"])
    return ranks


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("v3 with groups", "hybrid") else pytest.mark.rank) for name in MODELS],
)
def test_two_ranks_choose_the_tokens_of_one_process(folders: dict[str, Path], name: str):
    task = Task(folders[name], TURNS, FLOAT32 | {"kv_cache_bytes": 8 << 20}, scored=prompt(90, 4))
    driver, _ = assert_like_one_process(2, task)
    assert driver["counters"]["prefix_hits"] > 0
    assert 0 < driver["stage"][1] < 4


@pytest.mark.rank
@pytest.mark.parametrize("size", [3, 4])
def test_more_ranks_choose_the_tokens_of_one_process(folders: dict[str, Path], size: int):
    for name in ("v3 with groups", "hybrid"):
        assert_like_one_process(size, Task(folders[name], TURNS, FLOAT32, scored=prompt(90, 4)))


@pytest.mark.rank
@pytest.mark.parametrize("name", ["v3 with groups", "sparse", "hybrid"])
def test_prompts_in_chunks_and_a_cache_too_small_for_all(folders: dict[str, Path], name: str):
    whole = LLM(folders[name], **FLOAT32).cache
    sizes = range(whole.page_bytes + whole.sequence_bytes, 99 * whole.page_bytes, whole.page_bytes // 4)
    tight = next(size for size in sizes if pages_and_slots(whole.specs, size)[0] == 6)
    growing = [(prompt(60, seed), greedy(80)) for seed in range(3)]  # of two pages, then three each
    task = Task(folders[name], [*TURNS, growing], FLOAT32 | {"kv_cache_bytes": tight}, chunk=40)
    driver, _ = assert_like_one_process(2, task)
    assert driver["counters"]["preemptions"] > 0


@pytest.mark.parametrize(
    ("name", "draft"),
    [
        ("v3 with groups", "mtp"),
        *(
            pytest.param(name, draft, marks=pytest.mark.rank)
            for name, draft in (("v3 with groups", "ngram"), ("hybrid", "mtp"), ("kimi", "ngram"), ("sparse", "ngram"))
        ),
    ],
)
def test_drafts_change_no_token(folders: dict[str, Path], name: str, draft: str):
    turns: list[Turn] = [[(prompt(40) * 2, greedy(40)), (prompt(6) * 9, greedy(40)), (prompt(30, 3), seeded(1, 30))]]
    options = FLOAT32 | {"speculate": 3, "draft": draft, "kv_cache_bytes": 8 << 20}
    driver, _ = assert_like_one_process(2, Task(folders[name], turns, options))
    assert driver["counters"]["drafted_tokens"] > 0


@pytest.mark.skipif(len(available_backends()) == 1, reason="the native kernels were not built")
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bf16"},
        pytest.param({"dtype": "bf16", "weights": "int8"}, marks=pytest.mark.rank),
        pytest.param({"dtype": "bf16", "weights": "int4", "kv_dtype": "int8"}, marks=pytest.mark.rank),
        pytest.param({"dtype": "bf16", "weights": "int8", "activations": "int8"}, marks=pytest.mark.rank),
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_packed_stages_give_the_bits_of_one_process_and_record_their_steps(
    folders: dict[str, Path], options: dict[str, Any]
):
    task = Task(folders["v3 with groups"], TURNS, options | {"rank_timeout": 30}, scored=prompt(90, 4))
    for rank in assert_like_one_process(2, task):
        assert sum(rank["recorded"]) > 0


@pytest.mark.rank
def test_each_rank_has_its_own_layers_of_the_cache(folders: dict[str, Path]):
    task = Task(folders["v3 with groups"], TURNS[1:], FLOAT32 | {"kv_cache_bytes": 8 << 20})
    whole = in_one_process(task)
    driver, _ = generate(2, task)
    first, last = driver["stage"]
    assert driver["cache_bytes"] == whole["cache_bytes"] * (last - first) // 4


def test_as_many_steps_are_under_way_as_there_are_ranks(folders: dict[str, Path]):
    turns: list[Turn] = [[(prompt(20, seed), greedy(20)) for seed in range(6)]]
    driver, other = assert_like_one_process(2, Task(folders["v3 with groups"], turns, FLOAT32))
    # Of a message a head and a body are kept until it is known that they have arrived.
    assert max(driver["kept"], other["kept"]) <= 2 * (2 + 1)
    # Six sequences in two groups: each step has three of them.
    assert driver["counters"]["steps"] >= 2 * 19


_LOADED = (
    BEGIN
    + """
import threading, time
from pathlib import Path

peak = [0]
def own() -> int:
    # Memory of its own: pages of files that are mapped are the system's, and are given back when it needs them.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))
def look() -> None:
    while True:
        peak[0] = max(peak[0], own())
        time.sleep(0.002)

from latentkv import LLM
from latentkv import llm_loading
import torch
torch.empty(1)  # whatever the first tensor brings with it
before = own()
threading.Thread(target=look, daemon=True).start()
run_stage = llm_loading.run_stage

def tell(decoder, cache):
    share = sum(p.nbytes for p in decoder.parameters()) + cache.allocated_bytes
    print(json.dumps([max(peak[0], own()) - before, share]))
def looked_at(decoder, cache, *others):
    tell(decoder, cache)
    run_stage(decoder, cache, *others)

llm_loading.run_stage = looked_at
llm = LLM(task["folder"], **{task["how"]: int(size)}, rank_timeout=60, dtype="fp32", kv_cache_bytes=1 << 20)
tell(llm.decoder, llm.cache)
llm.close()
"""
)


@pytest.mark.rank
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell what memory is used")
@pytest.mark.parametrize("how", ["pipeline_parallel", "tensor_parallel"])
def test_a_rank_needs_memory_for_its_share_and_one_tensor(tmp_path: Path, how: str):
    config = {**LOW_RANK, "hidden_size": 512, "intermediate_size": 8192, "first_k_dense_replace": 4, "vocab_size": 8192}
    folder = write_model(tmp_path / "m", config)
    largest = 8192 * 512 * 4
    with ranks_of(_LOADED, 2, json.dumps({"folder": str(folder), "how": how})) as ranks:
        written = [(rank.stdout.read(), rank.stderr.read()) for rank in ranks]
        assert [rank.wait(60) for rank in ranks] == [0, 0], written
    found = [json.loads(out) for out, _ in written]
    assert all(share > 80 << 20 for _, share in found)
    assert all(peak <= share + largest + (80 << 20) for peak, share in found), found
