import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentkv.bench.load.client import Answer, Failure
from latentkv.bench.load.load import Level, LevelRun
from latentkv.bench.load.measures import percentiles, summarise
from latentkv.bench.load.slo import parse_slo
from latentkv.errors import RequestError

START = 1000.0


def answer(due: float, chunks: list[float], ended: float, **more) -> Answer:
    return Answer(
        due=START + due, sent=START + due, chunk_times=[START + at for at in chunks], ended=START + ended, **more
    )


def run(*answers: Answer, seconds: float = 10.0, sent: int | None = None) -> LevelRun:
    return LevelRun(Level(concurrency=2), START, list(answers), sent=sent or len(answers), seconds=seconds)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200))
def test_percentiles_are_numpys(sample: list[float]):
    found = percentiles(sample)
    assert found is not None
    assert found.n == len(sample)
    expected = np.percentile(sample, [50, 90, 99])
    np.testing.assert_allclose([found.p50, found.p90, found.p99], expected, rtol=1e-9, atol=1e-9)
    assert found.mean == pytest.approx(np.mean(sample))


def test_an_empty_sample_has_no_percentiles():
    assert percentiles([]) is None


def test_known_times_give_known_measures():
    first = answer(0.0, [1.0, 1.5, 2.5], 3.0, prompt_tokens=100, output_tokens=5, cached_tokens=50)
    second = answer(1.0, [5.0, 6.0], 7.0, prompt_tokens=60, output_tokens=2, cached_tokens=0)
    result = summarise(run(first, second))
    assert (result.concurrency, result.completed, result.failed, result.unfinished) == (2, 2, 0, 0)
    assert result.requests_per_second == 0.2
    assert result.output_tokens_per_second == 0.7
    assert result.total_tokens_per_second == 16.7
    assert (result.mean_prompt_tokens, result.mean_output_tokens) == (80, 3.5)
    assert result.cached_share == 50 / 160
    assert result.ttft_ms is not None and (result.ttft_ms.n, result.ttft_ms.p50) == (2, 2500)
    assert result.itl_ms is not None and (result.itl_ms.n, result.itl_ms.p50, result.itl_ms.mean) == (
        3,
        1000,
        pytest.approx(2500 / 3),
    )
    # 1.5 s over 4 tokens, and 1 s over one.
    assert result.tpot_ms is not None and (result.tpot_ms.n, result.tpot_ms.p50) == (2, (375 + 1000) / 2)
    assert result.e2e_ms is not None and (result.e2e_ms.mean, result.e2e_ms.p50) == (4500, 4500)
    assert result.goodput is None


def test_failed_requests_count_as_errors_by_kind_and_in_nothing_else():
    busy = Failure("HTTP 429", "queue is full", 429)
    failed = [answer(0.0, [0.5], 1.0, output_tokens=9, failure=busy) for _ in range(2)]
    failed.append(answer(0.0, [], 1.0, failure=Failure("timeout", "too slow")))
    result = summarise(run(answer(0.0, [1.0, 2.0], 2.0, prompt_tokens=8, output_tokens=2), *failed))
    assert [(e.kind, e.count, e.example) for e in result.errors] == [
        ("HTTP 429", 2, "queue is full"),
        ("timeout", 1, "too slow"),
    ]
    assert (result.completed, result.failed) == (1, 3)
    assert result.output_tokens_per_second == 0.2
    assert result.ttft_ms is not None and result.ttft_ms.n == 1
    assert [row.error for row in result.requests] == [None, "HTTP 429", "HTTP 429", "timeout"]


def test_a_level_where_all_failed_has_rates_of_zero_and_no_percentiles():
    result = summarise(run(answer(0.0, [], 1.0, failure=Failure("HTTP 500", "oh"))))
    assert (result.completed, result.output_tokens_per_second, result.ttft_ms, result.e2e_ms) == (0, 0, None, None)
    assert (result.mean_output_tokens, result.total_tokens_per_second) == (None, None)


def test_without_usage_tokens_are_chunks_and_totals_are_unknown():
    result = summarise(run(answer(0.0, [1.0, 2.0, 3.0], 3.0)))
    assert not result.tokens_from_usage
    assert result.output_tokens_per_second == 0.3
    assert result.total_tokens_per_second is result.mean_prompt_tokens is result.cached_share is None


def test_an_answer_of_one_chunk_has_no_gap_and_no_time_per_token():
    result = summarise(run(answer(0.0, [1.0], 1.0, output_tokens=7)))
    assert (result.itl_ms, result.tpot_ms) == (None, None)
    assert result.output_tokens_per_second == 0.7


def test_a_request_counts_from_when_it_was_due_not_from_when_the_client_got_to_it():
    late = Answer(due=START, sent=START + 0.25, chunk_times=[START + 1], ended=START + 1)
    result = summarise(run(late))
    assert result.latest_ms == 250
    assert result.ttft_ms is not None and result.ttft_ms.p50 == 1000


def test_goodput_counts_requests_that_kept_every_objective():
    good = answer(0.0, [1.0, 1.1], 1.2)
    slow_start = answer(0.0, [2.0, 2.1], 2.2)
    stalled = answer(0.0, [0.5, 0.9], 1.0)
    failed = answer(0.0, [], 0.1, failure=Failure("HTTP 500", "oh"))
    result = summarise(run(good, slow_start, stalled, failed), parse_slo("ttft=1s,itl=200ms"))
    assert result.goodput is not None
    assert (result.goodput.requests_per_second, result.goodput.share) == (0.1, 0.25)


def test_objectives_are_read_as_milliseconds():
    assert parse_slo("ttft=1.5s, itl = 200ms,tpot=50ms,e2e=10s") == {
        "ttft": 1500,
        "itl": 200,
        "tpot": 50,
        "e2e": 10_000,
    }


@pytest.mark.parametrize("text", ["", "ttft", "ttft=1", "ttft=fast", "mood=1s", "ttft=1s,"])
def test_other_objectives_are_refused(text: str):
    with pytest.raises(RequestError, match="objective"):
        parse_slo(text)


def test_requests_that_had_not_ended_are_neither_answered_nor_failed():
    assert summarise(run(answer(0.0, [1.0], 1.0), sent=4)).unfinished == 3
