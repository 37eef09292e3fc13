"""The engine under a constraint of a few lines, whose every step is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine_models import VOCAB, cache_for, tiny_decoder
from latentkv.engine import Engine, Event, NextToken, Request, SamplingParams, Structure, sample
from latentkv.engine.constraint import blocked_tokens
from latentkv.errors import RequestError

EOS = 2
LETTERS = (10, 11, 12)
CLOSE = 20
SOME_STRUCTURE = Structure.regex("what is compiled here is the class below")


class Word:
    """Texts of `least` letters or more, then CLOSE; after it nothing."""

    def __init__(self, least: int = 3, closable: bool = True, endless: bool = False) -> None:
        self.least, self.closable, self.endless = least, closable, endless
        self.states: list[WordState] = []

    def start(self) -> WordState:
        self.states.append(WordState(self))
        return self.states[-1]


class WordState:
    def __init__(self, word: Word) -> None:
        self._word = word
        self.tokens: list[int] = []

    @property
    def _closed(self) -> bool:
        return self.tokens[-1:] == [CLOSE]

    @property
    def allowed(self) -> np.ndarray:
        allowed = np.zeros(VOCAB, dtype=np.bool_)
        if self._closed or (not self._word.closable and len(self.tokens) == self._word.least):
            return allowed
        allowed[list(LETTERS)] = True
        allowed[CLOSE] = self._word.closable and len(self.tokens) >= self._word.least
        return allowed

    @property
    def may_end(self) -> bool:
        return self._closed or (self._word.endless and len(self.tokens) >= self._word.least)

    def accept(self, token_id: int) -> bool:
        assert self.allowed[token_id]
        self.tokens.append(token_id)
        return bool(self.allowed.any())


def ask(prompt: list[int], word: Word | None, **params) -> Request:
    params = {"max_tokens": 40, "temperature": 2, "seed": 1, **params}
    structure = None if word is None else SOME_STRUCTURE
    return Request.create(
        prompt, SamplingParams(structure=structure, **params), vocab_size=VOCAB, max_context=128, constraint=word
    )


def run(requests: list[Request], *, pages: int = 40, eos: tuple[int, ...] = (EOS,)) -> list[list[Event]]:
    decoder = tiny_decoder("mla")
    cache = cache_for(decoder, pages)
    result: list[list[Event]] = [[] for _ in requests]
    for event in Engine(decoder, cache, eos).run(requests):
        result[event.index].append(event)
        cache.check()
    assert cache.pool.free_pages == cache.num_pages
    return result


def tokens_of(events: list[Event]) -> list[int]:
    return [event.token_id for event in events]


def is_word(tokens: list[int], least: int = 3) -> bool:
    return len(tokens) > least and set(tokens[:-1]) <= set(LETTERS) and tokens[-1] == CLOSE


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("temperature", [0, 1, 100])
def test_only_allowed_tokens_are_chosen_and_the_end_of_the_structure_is_the_end(seed: int, temperature: float):
    (events,) = run([ask([5, 6], Word(), seed=seed, temperature=temperature)])
    if events[-1].finish_reason == "stop":
        assert is_word(tokens_of(events))
    else:
        assert len(events) == 40 and set(tokens_of(events)) <= set(LETTERS)
    assert all(event.finish_reason is None for event in events[:-1])


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": {7: 100, EOS: 100, CLOSE: 1}},
        {"repetition_penalty": 0.01},
        {"presence_penalty": -2, "frequency_penalty": -2},
        {"top_k": 1},
        {"top_p": 1e-9},
        {"min_p": 1},
        {"top_k": 50, "top_p": 0.9999},
    ],
)
def test_nothing_makes_a_forbidden_token_possible(params):
    for seed in range(5):
        (events,) = run([ask([5, 6, 7, 7], Word(), seed=seed, **params)])
        assert set(tokens_of(events)) <= {*LETTERS, CLOSE}


def test_end_tokens_are_allowed_exactly_where_the_text_may_end():
    bias = {EOS: 100.0, 3: 100.0}
    for stop, ends in (((), {EOS}), ((3,), {EOS, 3})):
        (events,) = run([ask([5], Word(endless=True), logit_bias=bias, stop_token_ids=stop)])
        assert set(tokens_of(events)[:3]) <= set(LETTERS)
        assert len(events) == 4 and events[3].token_id in ends and events[3].finish_reason == "stop"


def test_end_tokens_that_are_ignored_do_not_end_a_structure():
    (events,) = run([ask([5], Word(endless=True), logit_bias={EOS: 100}, ignore_eos=True)])
    assert EOS not in tokens_of(events)


def test_min_tokens_holds_back_the_end_but_never_leaves_nothing_to_choose():
    bias = {EOS: 100.0, CLOSE: -100.0}
    (events,) = run([ask([5], Word(endless=True), logit_bias=bias, min_tokens=9)])
    assert [event.token_id == EOS for event in events] == [False] * 9 + [True]
    # Of two tokens, one may not come yet, and the other is all that the structure allows.
    logits = torch.zeros(VOCAB)
    blocked = torch.ones(VOCAB, dtype=torch.bool)
    blocked[CLOSE] = False
    params = SamplingParams(min_tokens=5, temperature=1)
    for seed in range(5):
        assert sample(logits[None], [NextToken(params, seed, [1], 1, {CLOSE}, blocked)]) == [CLOSE]


def test_a_structure_that_no_token_can_complete_ends_that_request_alone():
    alone = tokens_of(run([ask([7, 8], None)])[0])
    stuck, other = run([ask([5], Word(closable=False)), ask([7, 8], None)])
    assert len(stuck) == 3 and stuck[-1].finish_reason == "length"
    assert tokens_of(other) == alone


def test_every_completion_has_a_state_of_its_own():
    word = Word()
    runs = run([ask([5], word, seed=seed) for seed in range(6)])
    assert [state.tokens for state in word.states] == [tokens_of(events) for events in runs]
    assert len({tuple(tokens_of(events)) for events in runs}) > 1


def test_a_request_that_gives_its_pages_back_goes_on_where_it_was():
    requests = [ask([5 + i] * 9, Word(20, endless=True), seed=i, ignore_eos=True, max_tokens=30) for i in range(3)]
    alone = [tokens_of(run([request])[0]) for request in requests]
    assert [tokens_of(events) for events in run(requests, pages=7)] == alone


def test_a_model_without_end_tokens_ends_with_its_structure():
    (events,) = run([ask([5], Word(), logit_bias={CLOSE: 100})], eos=())
    assert is_word(tokens_of(events)) and events[-1].finish_reason == "stop"


def test_a_structure_and_its_constraint_come_together():
    for params, word in ((SamplingParams(), Word()), (SamplingParams(structure=SOME_STRUCTURE), None)):
        with pytest.raises(RequestError, match="come together"):
            Request.create([1], params, vocab_size=VOCAB, max_context=8, constraint=word)


def test_blocking_leaves_what_the_state_says_as_it_is():
    state = Word(0, endless=True).start()
    blocked = blocked_tokens(state, {EOS, VOCAB + 3}, torch.device("cpu"))
    assert torch.equal(blocked_tokens(state, (), torch.device("cpu")).nonzero().flatten()[:3], torch.tensor([0, 1, 2]))
    assert (~blocked).nonzero().flatten().tolist() == [EOS, *LETTERS, CLOSE]
    assert state.allowed.nonzero()[0].tolist() == [*LETTERS, CLOSE]
