"""Random workloads: whatever comes, ends, is given up or pushed out, every request gets the tokens it gets alone."""

import functools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from draft_oracle import CheckedMTPDrafter
from engine_models import VOCAB, cache_for, tiny_decoder
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from offload_cases import BLOCK, forget, settle, store_for

from latentkv.engine import Engine, Request, SamplingParams, Sequence, offload, sample
from latentkv.engine.adaptive import AdaptiveDrafter
from latentkv.engine.drafts import NGramDrafter, Wish
from latentkv.models.decoder import Decoder

PAGE = 8  # tokens, see cache_for
SYSTEM = [5, 9, 33, 7, 50, 2, 41, 18]  # a page that many prompts begin with
PROMPTS = [
    [7],
    [11, 3],
    SYSTEM,
    [*SYSTEM, 21],
    [*SYSTEM, 40, 2, 17, 1, 60, 13, 14, 8],
    [*SYSTEM, 40, 2, 17, 1, 60, 13, 14, 8, 30, 30],
    [50] * 25,
    [*SYSTEM, *[3, 4] * 12],
]


@functools.cache
def decoder() -> Decoder:
    return tiny_decoder("mtp")


@functools.cache
@torch.inference_mode()
def alone(prompt: tuple[int, ...], count: int, temperature: float, seed: int) -> list[int]:
    """The tokens of a loop without a cache."""
    params = SamplingParams(max_tokens=count, temperature=temperature)
    tokens = list(prompt)
    for _ in range(count):
        hidden = decoder().forward_train(torch.tensor([tokens]))
        tokens.append(sample(decoder().logits(hidden[0, -1]).float(), params, seed=seed, tokens=tokens))
    return tokens[len(prompt) :]


class Foreseen:
    """Drafts that are right at first and wrong from some token on, so that every length is accepted."""

    def propose(self, wishes: list[Wish], seconds: float) -> list[list[int]]:
        return [self.draft(wish.sequence, wish.most) for wish in wishes]

    def forget(self, sequence: Sequence) -> None:
        pass

    def draft(self, sequence: Sequence, most: int) -> list[int]:
        right = len(sequence.tokens) % (most + 1)
        greedy = alone(tuple(sequence.tokens), most, 0.0, 0) if most else []
        return greedy[:right] + [(token + 1) % VOCAB for token in greedy[right:]]


DRAFTERS = {
    "none": lambda cache: None,
    "n-gram": lambda cache: NGramDrafter(shortest=1),
    "foreseen": lambda cache: Foreseen(),
    "MTP": lambda cache: CheckedMTPDrafter(decoder(), cache),
    "adaptive": lambda cache: AdaptiveDrafter(NGramDrafter(shortest=1), CheckedMTPDrafter(decoder(), cache)),
}


@dataclass
class Asked:
    prompt: tuple[int, ...]
    count: int
    temperature: float
    seed: int
    got: list[int] = field(default_factory=list)


class Workload(RuleBasedStateMachine):
    @initialize(
        pages=st.integers(6, 14),
        step_tokens=st.integers(1, 40),
        max_running=st.sampled_from([2, 4, 256]),
        drafter=st.sampled_from(list(DRAFTERS)),
        most_drafted=st.integers(1, 5),
    )
    def start(self, pages: int, step_tokens: int, max_running: int, drafter: str, most_drafted: int) -> None:
        self.cache = cache_for(decoder(), pages)
        self.engine = Engine(
            decoder(),
            self.cache,
            step_tokens=step_tokens,
            max_running=max_running,
            drafter=DRAFTERS[drafter](self.cache),
            most_drafted=most_drafted,
        )
        self.running: dict[int, Asked] = {}

    @rule(
        prompt=st.sampled_from(PROMPTS),
        count=st.integers(1, 14),
        temperature=st.sampled_from([0.0, 1.5]),
        seed=st.integers(0, 2),
        salt=st.sampled_from(["", "", "b"]),
    )
    def add(self, prompt: list[int], count: int, temperature: float, seed: int, salt: str) -> None:
        params = SamplingParams(max_tokens=count, temperature=temperature, seed=seed, ignore_eos=True)
        request = Request.create(prompt, params, vocab_size=VOCAB, max_context=128)
        index = self.engine.add(request, salt=salt)
        self.running[index] = Asked(tuple(prompt), count, temperature, seed)

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.one_step()

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.running:
            index = data.draw(st.sampled_from(sorted(self.running)))
            self.engine.abort(index)
            del self.running[index]

    def one_step(self) -> None:
        for event in self.engine.step():
            asked = self.running[event.index]
            asked.got.append(event.token_id)
            expected = alone(asked.prompt, asked.count, asked.temperature, asked.seed)
            assert asked.got == expected[: len(asked.got)]
            assert (event.finish_reason == "length") == (len(asked.got) == asked.count)
            if event.finish_reason:
                del self.running[event.index]
        self.cache.check()

    def finish(self) -> None:
        for _ in range(2000):
            if not self.running:
                break
            self.one_step()
        assert not self.running, "some requests never end"

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "engine"):
            assert self.engine.num_running + self.engine.num_waiting == len(self.running)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.finish()
        assert self.cache.pool.free_pages == self.cache.num_pages


class StoredWorkload(Workload):
    """The same with a store of a few pages, which come back when memory or the process has lost them."""

    @initialize(
        pages=st.integers(6, 14),
        step_tokens=st.integers(1, 40),
        max_running=st.sampled_from([2, 4, 256]),
        drafter=st.sampled_from(["none", "n-gram"]),
        stored=st.integers(1, 12),
    )
    def start(self, pages: int, step_tokens: int, max_running: int, drafter: str, stored: int) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(offload, "MIN_PAGES", 1)
        self.folder = tempfile.TemporaryDirectory()
        self.pages, self.max_bytes = pages, stored * BLOCK
        self.options = {"step_tokens": step_tokens, "max_running": max_running}
        self.drafter = DRAFTERS[drafter]
        self.running = {}
        self.open()

    def open(self) -> None:
        self.cache = cache_for(decoder(), self.pages)
        store = store_for(Path(self.folder.name), self.cache, max_bytes=self.max_bytes)
        self.engine = Engine(decoder(), self.cache, store=store, drafter=self.drafter(self.cache), **self.options)

    @rule(prompt=st.sampled_from(PROMPTS[3:]), salt=st.sampled_from(["", "b"]), lost=st.sampled_from(["memory", "all"]))
    def ask_again(self, prompt: list[int], salt: str, lost: str) -> None:
        """For what memory, or the process too, has just lost."""
        self.add(prompt, 3, 0.0, 0, salt)
        self.finish()
        if lost == "all":
            self.restart()
        settle(self.engine)
        forget(self.engine)
        self.add(prompt, 3, 0.0, 0, salt)

    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        settle(self.engine)
        files = sorted(Path(self.folder.name).glob("*.page"))
        if files:
            path = data.draw(st.sampled_from(files))
            content = bytearray(path.read_bytes())
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1
            path.write_bytes(content)

    @rule()
    def restart(self) -> None:
        for index in list(self.running):
            self.engine.abort(index)
        self.running.clear()
        assert self.cache.pool.free_pages == self.cache.num_pages
        self.engine.close()
        self.open()

    @invariant()
    def no_more_is_stored_than_may_be(self) -> None:
        if hasattr(self, "engine"):
            assert len(list(Path(self.folder.name).glob("*.page*"))) * BLOCK <= self.max_bytes

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            if hasattr(self, "engine"):
                self.engine.close()
                self.folder.cleanup()
                self.patch.undo()


Workload.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
StoredWorkload.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestWorkload = Workload.TestCase
TestStoredWorkload = StoredWorkload.TestCase


@pytest.mark.slow
@pytest.mark.parametrize("machine", [Workload, StoredWorkload])
def test_500_workloads(machine: type[RuleBasedStateMachine]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=500, stateful_step_count=25, deadline=None))
