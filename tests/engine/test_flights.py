"""Several steps under way at once: who takes part in which, and what becomes of those that fail or are given up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import SimpleQueue

import pytest
import torch
from workloads import alone

from engine_models import VOCAB
from latentkv.engine import Engine, Event, Request, SamplingParams
from latentkv.engine.adaptive import AdaptiveDrafter
from latentkv.engine.drafts import NGramDrafter
from latentkv.engine.scoring import sequence_logits
from latentkv.engine.thread import FAILURES, EngineThread, Health
from latentkv.errors import EngineStoppedError, StageError
from latentkv.models.batch import Batch
from latentkv.models.decoder import Decoder
from local_ranks import LocalRanks

PROMPT = [5, 9, 33, 7, 50, 2, 41, 18] * 5


def ask(prompt: list[int], max_tokens: int = 8, **params: object) -> Request:
    given = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, **params)  # pyright: ignore
    return Request.create(prompt, given, vocab_size=VOCAB, max_context=128)


def expected(kind: str, prompt: list[int], count: int = 8) -> list[int]:
    return alone(kind, tuple(prompt), count)


def drain(engine: Engine) -> dict[int, list[int]]:
    """The tokens of all requests on their way."""
    found: dict[int, list[int]] = {}
    while engine.num_running or engine.num_waiting:
        for event in engine.step():
            found.setdefault(event.index, []).append(event.token_id)
    return found


@pytest.fixture
def ranks() -> LocalRanks:
    return LocalRanks("mla", 2, 40)


@pytest.fixture
def engine(ranks: LocalRanks) -> Engine:
    return Engine(ranks.decoder, ranks.cache, pipeline=ranks.pipeline, step_tokens=8)


class Stages:
    """How long a pipeline of two stages takes, each step one unit in each, by the calls of the engine alone."""

    def __init__(self, ranks: LocalRanks) -> None:
        self.driver = self.other = 0.0
        self.done: list[float] = []
        self.steps = 0
        self.submit, self.collect = ranks.pipeline.submit, ranks.pipeline.collect
        ranks.pipeline.submit, ranks.pipeline.collect = self._submit, self._collect

    def _submit(self, *step: object) -> None:
        self.driver += 1
        self.other = max(self.other, self.driver) + 1
        self.done.append(self.other)
        self.steps += 1
        self.submit(*step)  # pyright: ignore

    def _collect(self) -> torch.Tensor:
        self.driver = max(self.driver, self.done.pop(0))
        return self.collect()

    @property
    def busy(self) -> float:
        """Stages that work, on average."""
        return 2 * self.steps / self.driver


@pytest.mark.parametrize("requests", [[PROMPT[: 3 + i] for i in range(6)], [PROMPT * 2]], ids=["many", "a long prompt"])
def test_two_stages_work_at_once(ranks: LocalRanks, engine: Engine, requests: list[list[int]]):
    stages = Stages(ranks)
    tokens = 20 if len(requests) > 1 else 1
    indices = [engine.add(ask(prompt, tokens)) for prompt in requests]
    assert drain(engine) == {i: expected("mla", prompt, tokens) for i, prompt in zip(indices, requests, strict=True)}
    several = stages.busy
    ranks.pipeline.depth = engine.runner.depth = 1
    stages.driver = stages.other = stages.steps = 0
    for prompt in requests:
        engine.add(ask([*prompt[:-1], 30], tokens))
    drain(engine)
    assert several / stages.busy >= 1.7


def test_those_that_decode_are_shared_out_evenly_and_stay_together(ranks: LocalRanks):
    engine = Engine(ranks.decoder, ranks.cache, pipeline=ranks.pipeline)
    for i in range(6):
        engine.add(ask([7, 3 + i], 30))
    groups: list[tuple[int, ...]] = []
    submit = engine.runner.submit
    engine.runner.submit = lambda sequences, counts: (  # pyright: ignore
        groups.append(tuple(each.index for each in sequences)),
        submit(sequences, counts),
    )
    drain(engine)
    assert set(groups[4:40]) == {(0, 1, 2), (3, 4, 5)}


@pytest.fixture
def failing(ranks: LocalRanks, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Batch], bool]], None]]:
    """Lets the other rank fail in steps."""
    (decoder,) = ranks.stages
    run_layers, when = Decoder.run_layers, [lambda batch: False]

    def run(self: Decoder, x: torch.Tensor, positions: object, batch: Batch, *rest: object, **named: object):
        if self is decoder and when[0](batch):
            raise RuntimeError("no memory")
        return run_layers(self, x, positions, batch, *rest, **named)  # pyright: ignore

    monkeypatch.setattr(Decoder, "run_layers", run)
    # Recorded before this was set.
    monkeypatch.setattr("latentkv.models.replay.MOST_ROWS", 0)
    for loop in ranks.pipeline._ring.loops:
        loop._replay.layers = decoder.run_layers
    yield lambda condition: when.__setitem__(0, condition)


def test_a_prompt_that_fails_in_several_steps_fails_once_and_nobody_else(
    ranks: LocalRanks, engine: Engine, failing: Callable[[Callable[[Batch], bool]], None]
):
    failing(lambda batch: max(batch.kv_lens) > 20)
    bad = engine.add(ask(PROMPT, 4))
    with pytest.raises(StageError, match="Rank 1 could not compute its part of a step: no memory"):
        drain(engine)
    assert bad not in engine and ranks.cache.pool.free_pages == ranks.cache.num_pages
    later = engine.add(ask([7, 3]))  # while the next part of the prompt, which fails as well, is on its way
    assert drain(engine) == {later: expected("mla", [7, 3])}


def test_a_stage_that_always_fails_ends_a_guarded_engine(
    engine: Engine, failing: Callable[[Callable[[Batch], bool]], None]
):
    failing(lambda batch: True)
    thread = EngineThread(engine)
    thread.start()
    thread.guard(max_open=9, stall_seconds=60)
    heard: SimpleQueue[tuple[Event | Exception, Health]] = SimpleQueue()
    for number in range(FAILURES):
        thread.submit(ask([7, 3]), lambda said: heard.put((said, thread.health())))
        said, health = heard.get(timeout=20)
        assert isinstance(said, StageError | EngineStoppedError)
        assert (health.state == "dead") == (number == FAILURES - 1), "whoever hears of the last failure finds it dead"
    assert "no memory" in health.reason


def test_whoever_is_given_up_while_on_the_way_leaves_nothing(ranks: LocalRanks):
    drafter = AdaptiveDrafter(NGramDrafter(shortest=1))
    engine = Engine(ranks.decoder, ranks.cache, pipeline=ranks.pipeline, drafter=drafter, step_tokens=8)
    for _ in range(3):
        first, second = engine.add(ask([5] * 30)), engine.add(ask([9, 9, 9]))
        for _ in range(4):
            engine.step()
        engine.abort(first)
        engine.abort(second)
        engine.step()
        assert engine.num_running == 0 and ranks.cache.pool.free_pages == ranks.cache.num_pages
    last = engine.add(ask([7, 3]))
    assert drain(engine) == {last: expected("mla", [7, 3])}


def test_a_text_is_scored_while_steps_are_under_way(ranks: LocalRanks, engine: Engine):
    index = engine.add(ask([7, 3], 20))
    found: list[int] = []
    for _ in range(5):
        found += [event.token_id for event in engine.step()]
        engine.step()  # one more is under way
        logits = sequence_logits(engine.runner, PROMPT[:12])
        assert logits.argmax(-1)[-1] == expected("mla", PROMPT[:12], 1)[0]
    assert [*found, *drain(engine)[index]][-5:] == expected("mla", [7, 3], 20)[-5:]


def test_logprobs_of_a_prompt_whose_parts_follow_each_other(ranks: LocalRanks, engine: Engine):
    whole = LocalRanks("mla", 1, 40)
    request = ask(PROMPT, 2, prompt_logprobs=1)
    one = next(iter(Engine(whole.decoder, whole.cache, step_tokens=8).run([request])))
    several = next(iter(engine.run([request])))
    assert several.prompt_logprobs == one.prompt_logprobs
    assert len(several.prompt_logprobs or ()) == len(PROMPT) - 1
