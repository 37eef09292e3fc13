"""Processes that share each layer out give the tokens of one process."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_faults import AT_MOST, NOBODY_HANGS, OPTIONS, SERVE, Cluster, Stream, ask, cluster
from test_pipeline import FLOAT32, LOW_RANK, MODELS, TURNS, folders, greedy, in_one_process, prompt, seeded

from latentkv import LLM
from latentkv.kernels import available_backends
from latentkv.state import pages_and_slots
from rank_programs import BEGIN, Task, Turn, generate, ranks_of
from stored_models import write_model

__all__ = ["folders"]  # a fixture

HEADS = {"num_attention_heads": 5, "num_key_value_heads": 5, "linear_num_heads": 5}
"""Of models that are shared out among more than two: not all have as many."""

WITHOUT_KERNELS = "import latentkv.parallel.ranks as ranks_\nranks_.extension = None\n"

needs_kernels = pytest.mark.skipif(len(available_backends()) == 1, reason="the native kernels were not built")


def assert_like_one_process(size: int, task: Task, team: int | None = None) -> list[dict[str, Any]]:
    """Of ranks of which so many, or all, share each layer out."""
    one = in_one_process(task)
    task.options |= {"tensor_parallel": team or size}
    ranks = generate(size, task)
    assert ranks[0]["tokens"] == one["tokens"]
    if task.scored:
        assert torch.allclose(torch.tensor(ranks[0]["logits"]), one["logits"], atol=1e-4, rtol=0)
    return ranks


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("v3 with groups", "kimi") else pytest.mark.rank) for name in MODELS],
)
def test_two_ranks_choose_the_tokens_of_one_process(folders: dict[str, Path], name: str):
    task = Task(folders[name], TURNS, FLOAT32 | {"kv_cache_bytes": 8 << 20}, scored=prompt(90, 4))
    driver, _ = assert_like_one_process(2, task)
    assert driver["counters"]["prefix_hits"] > 0
    assert driver["stage"] == [0, 4]


@pytest.mark.rank
@pytest.mark.parametrize(("size", "team"), [(3, 3), (4, 4), (4, 2)])
@pytest.mark.parametrize("name", ["v2", "v3 with groups", "glm", "minicpm3", "sparse", "kimi", "streams"])
def test_more_ranks_and_stages_of_several_choose_the_tokens_of_one_process(
    tmp_path: Path, name: str, size: int, team: int
):
    options = FLOAT32 | {"kv_cache_bytes": 8 << 20}
    task = Task(write_model(tmp_path / "m", MODELS[name] | HEADS), TURNS, options, chunk=100, scored=prompt(90, 4))
    assert_like_one_process(size, task, team)


@pytest.mark.rank
@pytest.mark.parametrize("name", ["v3 with groups", "sparse", "hybrid"])
def test_prompts_in_chunks_and_a_cache_too_small_for_all(folders: dict[str, Path], name: str):
    whole = LLM(folders[name], **FLOAT32).cache
    sizes = range(whole.page_bytes + whole.sequence_bytes, 99 * whole.page_bytes, whole.page_bytes // 4)
    tight = next(size for size in sizes if pages_and_slots(whole.specs, size)[0] == 6)
    growing = [(prompt(60, seed), greedy(80)) for seed in range(3)]
    task = Task(folders[name], [*TURNS, growing], FLOAT32 | {"kv_cache_bytes": tight}, chunk=40)
    driver, _ = assert_like_one_process(2, task)
    assert driver["counters"]["preemptions"] > 0


@pytest.mark.parametrize(
    ("name", "draft", "size"),
    [
        ("v3 with groups", "mtp", 2),
        *(
            pytest.param(name, draft, size, marks=pytest.mark.rank)
            for name, draft, size in (
                ("v3 with groups", "ngram", 2),
                ("v3 with groups", "mtp", 4),
                ("hybrid", "mtp", 2),
                ("kimi", "ngram", 2),
                ("sparse", "ngram", 2),
            )
        ),
    ],
)
def test_drafts_change_no_token(folders: dict[str, Path], name: str, draft: str, size: int):
    turns: list[Turn] = [[(prompt(40) * 2, greedy(40)), (prompt(6) * 9, greedy(40)), (prompt(30, 3), seeded(1, 30))]]
    options = FLOAT32 | {"speculate": 3, "draft": draft, "kv_cache_bytes": 8 << 20}
    driver, *_ = assert_like_one_process(size, Task(folders[name], turns, options), team=2)
    assert driver["counters"]["drafted_tokens"] > 0


@needs_kernels
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"weights": "int8"}, "v3 with groups"),
        pytest.param({"weights": "int4"}, "kimi", marks=pytest.mark.rank),
        pytest.param({"weights": "int8"}, "minicpm3", marks=pytest.mark.rank),  # whose head is tied
        pytest.param({"weights": "int4", "kv_dtype": "int8"}, "sparse", marks=pytest.mark.rank),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_weights_that_are_rounded_while_loading_are_those_of_one_process(
    folders: dict[str, Path], options: dict[str, Any], name: str
):
    task = Task(folders[name], TURNS, FLOAT32 | options, scored=prompt(90, 4))
    assert_like_one_process(2, task)


@needs_kernels
def test_packed_shards_record_their_steps_which_give_the_same_bits(folders: dict[str, Path]):
    options = {"dtype": "bf16", "rank_timeout": 30, "tensor_parallel": 2}
    task = Task(folders["v3 with groups"], TURNS, options, scored=prompt(90, 4))
    recorded = generate(2, task)
    assert all(sum(rank["recorded"]) > 0 for rank in recorded)
    plain = generate(2, task, "import latentkv.models.replay as replay\nreplay.MOST_ROWS = 0\n")
    assert all(sum(rank["recorded"]) == 0 for rank in plain)
    assert recorded[0]["tokens"] == plain[0]["tokens"] and recorded[0]["logits"] == plain[0]["logits"]


@pytest.mark.rank
@needs_kernels
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sums_over_gloo_have_the_bits_of_those_through_memory(folders: dict[str, Path], dtype: str):
    options = {"dtype": dtype, "rank_timeout": 30, "tensor_parallel": 2}
    task = Task(folders["v3 with groups"], TURNS, options, scored=prompt(90, 4))
    memory = generate(2, task)
    gloo = generate(2, task, WITHOUT_KERNELS)
    assert memory[0]["common_memory"] and gloo[0]["common_memory"] is None
    assert memory[0]["tokens"] == gloo[0]["tokens"] and memory[0]["logits"] == gloo[0]["logits"]


def test_half_precision_is_as_near_to_the_truth_as_in_one_process(folders: dict[str, Path]):
    scored = prompt(90, 4)
    truth = in_one_process(Task(folders["v3 with groups"], TURNS[1:], FLOAT32, scored=scored))["logits"]
    task = Task(folders["v3 with groups"], TURNS[1:], {"dtype": "bf16", "rank_timeout": 30}, scored=scored)
    one = (in_one_process(task)["logits"] - truth).square().mean()
    task.options |= {"tensor_parallel": 2}
    shared = (torch.tensor(generate(2, task)[0]["logits"]) - truth).square().mean()
    assert float(shared) < 1.5 * float(one)


@needs_kernels
def test_each_rank_has_half_of_what_is_shared_out_and_latents_are_there_once(folders: dict[str, Path]):
    task = Task(folders["v3 with groups"], TURNS[1:], FLOAT32 | {"kv_cache_bytes": 8 << 20, "tensor_parallel": 2})
    whole = in_one_process(Task(task.folder, task.turns, FLOAT32 | {"kv_cache_bytes": 8 << 20}))
    driver, _ = generate(2, task)
    assert driver["cache_bytes"] == whole["cache_bytes"]
    resident, fair_share = driver["common_memory"]
    assert 0 < resident <= whole["cache_bytes"] and fair_share == resident / 2
    decoder = whole["llm"].decoder
    rest = sum(
        tensor.nbytes
        for name, tensor in decoder.named_parameters()
        if name.startswith("mtp.")
        or "norm" in name
        or any(part in name for part in ("embed", "_a_proj", "gate.weight"))
    )
    all_ = sum(tensor.nbytes for tensor in decoder.parameters())
    # Vocabularies are shared out in 32s: one of 61 tokens is not in halves.
    assert abs(driver["weight_bytes"] - (rest + (all_ - rest) / 2)) <= 4 * 4 * 32


def test_a_killed_rank_ends_all_and_its_streams_with_an_error_that_names_it(folders: dict[str, Path]):
    with cluster(2, folders["v2"], "--pipeline-parallel", "1", "--tensor-parallel", "2") as ranks:
        port = ranks.wait_for_port()
        stream = Stream(port, 10, 900)
        stream.wait_for("text")
        ranks.ranks[1].kill()
        assert ranks.wait_for_end() < AT_MOST
        assert stream.ended.wait(5)
        assert ranks.codes == [1, -9]
    assert '"error"' in stream.events and "Rank 1 is gone" in stream.events
    assert "Rank 1 is gone" in ranks.said(0)


@pytest.mark.rank
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", range(4))
def test_whichever_rank_of_two_teams_is_lost_all_end(folders: dict[str, Path], victim: int, sign: signal.Signals):
    with cluster(4, folders["v2"], "--pipeline-parallel", "2", "--tensor-parallel", "2") as ranks:
        port = ranks.wait_for_port()
        stream = Stream(port, 10, 900)
        stream.wait_for("text")
        ranks.ranks[victim].send_signal(sign)
        assert ranks.wait_for_end() < AT_MOST
        assert stream.ended.wait(5)
        assert all(code not in (0, None) for code in ranks.codes), (ranks.codes, ranks.lines)
    said = "".join(ranks.said(rank) for rank in range(4) if rank != victim)
    assert f"Rank {victim}" in said


@pytest.mark.rank
def test_a_signal_lets_open_answers_end_and_then_all_ranks(folders: dict[str, Path]):
    options = ["--pipeline-parallel", "1", "--tensor-parallel", "2", *NOBODY_HANGS, "--drain-seconds", "20"]
    with cluster(2, folders["v2"], *options) as ranks:
        port = ranks.wait_for_port()
        stream = Stream(port, 10, 60)
        stream.wait_for("text")
        for rank in ranks.ranks:
            rank.send_signal(signal.SIGTERM)
        assert ranks.wait_for_end() < 30
        assert stream.ended.wait(5)
        assert ranks.codes == [0, 0]
    assert "[DONE]" in stream.events and '"error"' not in stream.events


def test_a_rank_that_ends_while_nothing_is_computed_is_missed_at_once(folders: dict[str, Path]):
    options = ["--pipeline-parallel", "1", "--tensor-parallel", "2", "--rank-timeout", "60"]
    with cluster(2, folders["v2"], *options) as ranks:
        ranks.wait_for_port()
        ranks.ranks[1].kill()
        assert ranks.wait_for_end() < 10
        assert ranks.codes == [1, -9]
    assert "Rank 1 is gone" in ranks.said(0)


@pytest.mark.rank
def test_over_gloo_the_rank_that_is_gone_is_named(folders: dict[str, Path]):
    task = json.dumps({"folder": str(folders["streams"]), "options": [*OPTIONS, "--tensor-parallel", "3"]})
    code = WITHOUT_KERNELS + SERVE.replace("--pipeline-parallel", "--max-running")
    with ranks_of(code, 3, task) as programs:
        ranks = Cluster(programs)
        stream = Stream(ranks.wait_for_port(), 10, 900)
        stream.wait_for("text")
        ranks.ranks[2].kill()
        assert ranks.wait_for_end() < AT_MOST
        assert all(code not in (0, None) for code in ranks.codes)
        assert "add up over gloo" in ranks.said(0) and "Rank 2 is gone" in ranks.said(0)


_BROKEN = """
import latentkv.parallel.stage_loop as stage_loop
if sys.argv[1] == "1":
    import latentkv.parallel.sums as sums
    calls = [0]
    def broken(original):
        def sometimes(*arguments, **named):
            calls[0] += 1
            if calls[0] in task["at"]:
                raise MemoryError("no room")
            return original(*arguments, **named)
        return sometimes
    if task["where"] == "copy":
        stage_loop.StageLoop._copy = broken(stage_loop.StageLoop._copy)
    elif task["where"] == "batch":
        stage_loop.batch_of = broken(stage_loop.batch_of)
    else:
        sums.message_of = broken(sums.message_of)
from latentkv import LLM, SamplingParams
from latentkv.errors import EngineStoppedError, StageError
llm = LLM(task["folder"], tensor_parallel=int(size), rank_timeout=30, dtype="fp32", kv_cache_bytes=8 << 20)
said = []
for prompt in task["prompts"]:
    try:
        params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        said.append(llm.generate([prompt], params)[0].token_ids)
    except (EngineStoppedError, StageError) as error:
        said.append(f"{type(error).__name__}: {error}")
print(json.dumps(said), flush=True)
"""


@pytest.mark.parametrize("where", ["batch", "message", "copy"])
def test_what_fails_in_one_rank_anywhere_is_an_error_and_no_wrong_token(folders: dict[str, Path], where: str):
    """Copies of recurrent states have been lost so, and sums taken of what lay there from the step before."""
    name = "kimi" if where == "copy" else "v2"
    prompts = [prompt(300), *([*prompt(300), 7 + seed, 8] for seed in range(6))]
    llm = LLM(folders[name], dtype="fp32", kv_cache_bytes=8 << 20)
    params = greedy()
    expected = [llm.generate([each], params)[0].token_ids for each in prompts]
    at = [1] if where == "copy" else [20, 45]
    task = json.dumps({"folder": str(folders[name]), "prompts": prompts, "where": where, "at": at})
    with ranks_of(BEGIN + _BROKEN, 2, task) as ranks:
        out, err = ranks[0].stdout.read(), ranks[0].stderr.read()
    assert out, err
    failed = 0
    for said, tokens in zip(json.loads(out), expected, strict=True):
        assert said == tokens or "Rank 1 could not" in said, (said, tokens)
        failed += said != tokens
    assert failed == len(at) if where != "copy" else failed > 0


_FAILING = (
    BEGIN
    + """
from latentkv.models.moe import MoE
compute, calls = MoE.forward, [0]
def sometimes(self, x, residual=None):
    calls[0] += 1
    if rank == task["rank"] and calls[0] % 40 == 39:
        raise MemoryError("no room for experts")
    return compute(self, x, residual)
MoE.forward = sometimes
sys.argv = ["latentkv", "serve", task["folder"], "--port", "0", "--tensor-parallel", size, *task["options"]]
from latentkv.cli.app import main
main()
"""
)


@pytest.mark.parametrize("rank", ["0", pytest.param("1", marks=pytest.mark.rank)])
def test_a_step_that_fails_in_one_rank_ends_its_requests_alone(folders: dict[str, Path], rank: str):
    task = json.dumps({"folder": str(folders["v2"]), "options": OPTIONS, "rank": rank})
    with ranks_of(_FAILING, 2, task) as programs:
        ranks = Cluster(programs)
        port = ranks.wait_for_port()
        found = [ask(port, "POST", "/v1/completions", _short(seed)) for seed in range(12)]
        assert ask(port, "GET", "/health")[0] == 200
    failed = [text for status, text in found if status != 200]
    assert 2 <= len(failed) < len(found) - 2
    named = "Rank 1 could not compute its part of a step" if rank == "1" else "its log says why"
    assert all(named in text for text in failed), failed
    assert "no room for experts" in ranks.said(int(rank))


def _short(seed: int) -> dict[str, Any]:
    return {"model": "m", "prompt": prompt(5, seed), "max_tokens": 3, "ignore_eos": True}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tensor_parallel": 0}, "tensor_parallel=0 is no number of processes"),
        ({"tensor_parallel": 2, "cache_dir": "x"}, "cache_dir cannot be had with tensor_parallel"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(folders: dict[str, Path], options: dict[str, Any], expected: str):
    from latentkv.errors import ConfigError

    with pytest.raises(ConfigError, match=expected):
        LLM(folders["v2"], **options)


def test_more_ranks_than_heads_are_refused_by_all(tmp_path: Path):
    folder = write_model(tmp_path / "m", LOW_RANK | {"num_attention_heads": 2, "num_key_value_heads": 2})
    code = BEGIN + "from latentkv import LLM\nLLM(task, tensor_parallel=int(size), rank_timeout=30)"
    with ranks_of(code, 3, json.dumps(str(folder))) as ranks:
        said = [rank.stderr.read() for rank in ranks]
        assert all(rank.wait(60) for rank in ranks)
    assert all("tensor_parallel=3 cannot be had: a layer has 2 heads" in each for each in said), said
