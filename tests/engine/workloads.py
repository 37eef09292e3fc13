"""Random workloads: whatever comes, ends, is given up or pushed out, every request gets the tokens it gets alone."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from draft_oracle import CheckedMTPDrafter
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from offload_cases import BLOCK, forget, settle, store_for
from torch import Tensor

from engine_models import VOCAB, cache_for, tiny_decoder
from latentkv.engine import (
    Engine,
    NextToken,
    Request,
    SamplingParams,
    Sequence,
    adaptive,
    engine,
    offload,
    sample,
    snapshots,
)
from latentkv.engine.adaptive import AdaptiveDrafter
from latentkv.engine.drafts import NGramDrafter, Wish
from latentkv.engine.mtp import MTPDrafter
from latentkv.kernels import Backend, available_backends, use_backend
from latentkv.state import PagedCache
from local_ranks import LocalRanks

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


HYBRIDS = ["hybrid mtp", "bailing mtp", "kimi", "ling25 mtp", "glm5"]
decoder = functools.cache(tiny_decoder)


@functools.cache
@torch.inference_mode()
def logits_after(kind: str, tokens: tuple[int, ...]) -> Tensor:
    """Of the whole text, without a cache."""
    model = decoder(kind)
    return model.logits(model.forward_train(torch.tensor([tokens]))[0, -1]).float()


@functools.cache
def alone(kind: str, prompt: tuple[int, ...], count: int, temperature: float = 0.0, seed: int = 0) -> list[int]:
    """The tokens of a loop without a cache."""
    params = SamplingParams(temperature=temperature)
    tokens = list(prompt)
    for _ in range(count):
        tokens += sample(logits_after(kind, tuple(tokens))[None], [NextToken(params, seed, tokens)])
    return tokens[len(prompt) :]


class Foreseen:
    """Drafts that are right at first and wrong from some token on, so that every length is accepted."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def propose(self, wishes: list[Wish], seconds: float) -> list[list[int]]:
        return [self.draft(wish.sequence, wish.most) for wish in wishes]

    def forget(self, sequence: Sequence) -> None:
        pass

    def draft(self, sequence: Sequence, most: int) -> list[int]:
        right = len(sequence.tokens) % (most + 1)
        greedy = alone(self.kind, tuple(sequence.tokens), most)
        return greedy[:right] + [(token + 1) % VOCAB for token in greedy[right:]]


DRAFTERS = {
    "none": lambda kind, cache: None,
    "n-gram": lambda kind, cache: NGramDrafter(shortest=1),
    "foreseen": lambda kind, cache: Foreseen(kind),
    "MTP": lambda kind, cache: CheckedMTPDrafter(decoder(kind), cache),
    "adaptive": lambda kind, cache: AdaptiveDrafter(NGramDrafter(shortest=1), CheckedMTPDrafter(decoder(kind), cache)),
}


class Clock:
    """Each look at it comes a millisecond after the last: what adapts to speeds does the same in every run."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-3
        return self.now


def with_steady_clock() -> pytest.MonkeyPatch:
    """Lets engines and drafters look at a clock of this kind until it is undone."""
    patch, clock = pytest.MonkeyPatch(), Clock()
    for module in (engine, adaptive):
        patch.setattr(module, "time", clock)
    return patch


@dataclass
class Asked:
    prompt: tuple[int, ...]
    count: int
    temperature: float
    seed: int
    got: list[int] = field(default_factory=list)


class Workload(RuleBasedStateMachine):
    """Of a model whose layers all attend."""

    kind = "mtp"

    @initialize(
        pages=st.integers(6, 14),
        step_tokens=st.integers(1, 40),
        max_running=st.sampled_from([2, 4, 256]),
        drafter=st.sampled_from(list(DRAFTERS)),
        most_drafted=st.integers(1, 5),
    )
    def start(self, pages: int, step_tokens: int, max_running: int, drafter: str, most_drafted: int) -> None:
        self.patch = with_steady_clock()
        self.running: dict[int, Asked] = {}
        self.make_engine(
            drafter, {"num_pages": pages}, step_tokens=step_tokens, max_running=max_running, most_drafted=most_drafted
        )

    def make_engine(self, drafter: str, sizes: dict[str, int], **options: Any) -> None:
        """An engine, and its cache of these sizes."""
        self.cache = cache_for(decoder(self.kind), **sizes)
        self.engine = Engine(
            decoder(self.kind), self.cache, drafter=DRAFTERS[drafter](self.kind, self.cache), **options
        )

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
            expected = alone(self.kind, asked.prompt, asked.count, asked.temperature, asked.seed)
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
        try:
            self.finish()
            self.nothing_is_held()
        finally:
            self.patch.undo()

    def nothing_is_held(self) -> None:
        assert self.cache.pool.free_pages == self.cache.num_pages
        assert self.cache.slots is None or self.cache.slots.free_slots == self.cache.num_slots


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
        self.prepare(pages, drafter, stored, {"step_tokens": step_tokens, "max_running": max_running})

    def prepare(self, pages: int, drafter: str, stored: int, options: dict[str, Any]) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(offload, "MIN_PAGES", 1)
        self.folder = tempfile.TemporaryDirectory()
        self.pages, self.max_bytes, self.options = pages, stored * BLOCK, options
        self.drafter = DRAFTERS[drafter]
        self.running = {}
        self.open()

    def new_cache(self) -> PagedCache:
        return cache_for(decoder(self.kind), self.pages)

    def open(self) -> None:
        self.cache = self.new_cache()
        store = store_for(Path(self.folder.name), self.cache, max_bytes=self.max_bytes)
        drafter = self.drafter(self.kind, self.cache)
        self.engine = Engine(decoder(self.kind), self.cache, store=store, drafter=drafter, **self.options)

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

    @rule(which=st.integers(0, 99), where=st.integers(0, 9999))
    def damage(self, which: int, where: int) -> None:
        settle(self.engine)
        files = sorted(Path(self.folder.name).glob("*-*.*"))
        if files:
            path = files[which % len(files)]
            content = bytearray(path.read_bytes())
            content[where % len(content)] ^= 1
            path.write_bytes(content)

    @rule()
    def restart(self) -> None:
        for index in list(self.running):
            self.engine.abort(index)
        self.running.clear()
        self.nothing_is_held()
        self.engine.close()
        self.open()

    @invariant()
    def no_more_is_stored_than_may_be(self) -> None:
        if hasattr(self, "engine"):
            settle(self.engine)
            files = [path for path in Path(self.folder.name).iterdir() if path.suffix in (".page", ".state")]
            assert sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in files) <= self.max_bytes

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            if hasattr(self, "engine"):
                self.engine.close()
                self.folder.cleanup()


class HybridWorkload(Workload):
    """Of models with a recurrent layer: whoever shares a prefix goes on from a snapshot."""

    @initialize(
        kind=st.sampled_from(HYBRIDS),
        backend=st.sampled_from(["torch", available_backends()[-1]]),
        pages=st.integers(6, 14),
        slots=st.integers(1, 6),
        every=st.integers(1, 3),
        least=st.integers(1, 3),
        step_tokens=st.integers(1, 40),
        max_running=st.sampled_from([2, 4, 256]),
        drafter=st.sampled_from(list(DRAFTERS)),
        most_drafted=st.integers(1, 5),
    )
    def start(
        self,
        kind: str,
        backend: Backend,
        pages: int,
        slots: int,
        every: int,
        least: int,
        step_tokens: int,
        max_running: int,
        drafter: str,
        most_drafted: int,
    ) -> None:
        self.kind, self.backend = kind, backend
        self.patch = with_steady_clock()
        self.patch.setattr(snapshots, "LEAST_PAGES", least)
        if not decoder(kind).mtp and drafter in ("MTP", "adaptive"):
            drafter = "n-gram"
        self.make_engine(
            drafter,
            {"num_pages": pages, "num_slots": slots, "most_drafted": most_drafted},
            step_tokens=step_tokens,
            max_running=max_running,
            most_drafted=most_drafted,
            snapshot_every=every,
        )
        self.running = {}
        self.seen: dict[tuple[object, object], bytes] = {}

    @rule(text=st.sampled_from(PROMPTS[5:]), end=st.integers(1, 32), more=st.integers(0, 3), salt=st.sampled_from("ab"))
    def add_a_part(self, text: list[int], end: int, more: int, salt: str) -> None:
        """A prompt that leaves another anywhere."""
        self.add([*text[:end], *[44] * more], 4, 0.0, 0, salt)

    def one_step(self) -> None:
        with use_backend(self.backend):
            super().one_step()
        self.what_is_known_stays()

    def what_is_known_stays(self) -> None:
        """Pages and snapshots that can be found hold the same bytes as ever."""
        prefixes, seen = self.engine._scheduler.prefixes, self.seen
        assert prefixes._snapshots.keys() <= {known.id for known in prefixes._known.values()}
        assert len(prefixes._snapshots) == self.cache.slots.num_snapshots
        now = {(known, None): known.page for known in prefixes._known.values()}
        now |= {(id, slot): slot.index for id, slot in prefixes._snapshots.items()}
        self.seen = {}
        for key, index in now.items():
            tensors = self.cache.storage if key[1] is None else self.cache.slot_storage
            content = b"".join(tensor[index].numpy().tobytes() for tensor in tensors)
            assert seen.get(key, content) == content
            self.seen[key] = content


class StoredHybridWorkload(StoredWorkload):
    """The same with a store, to which snapshots go with the pages."""

    @initialize(
        kind=st.sampled_from(HYBRIDS),
        pages=st.integers(6, 14),
        slots=st.integers(1, 6),
        every=st.integers(1, 3),
        least=st.integers(1, 3),
        step_tokens=st.integers(1, 40),
        drafter=st.sampled_from(["none", "n-gram", "foreseen"]),
        stored=st.integers(3, 24),
    )
    def start(
        self, kind: str, pages: int, slots: int, every: int, least: int, step_tokens: int, drafter: str, stored: int
    ) -> None:
        self.kind, self.slots = kind, slots
        self.prepare(pages, drafter, stored, {"step_tokens": step_tokens, "snapshot_every": every})
        self.patch.setattr(snapshots, "LEAST_PAGES", least)

    def new_cache(self) -> PagedCache:
        return cache_for(decoder(self.kind), self.pages, num_slots=self.slots)


class InRanks:
    """Mixed into a workload: layers are in several ranks, and as many steps are under way."""

    num_ranks = 2

    def make_engine(self, drafter: str, sizes: dict[str, int], **options: Any) -> None:
        """An engine of the first rank, and its cache of these sizes."""
        kind = self.kind
        ranks = LocalRanks(kind, self.num_ranks, **sizes)
        self.cache = ranks.cache
        made = DRAFTERS[drafter](kind, self.cache)
        if isinstance(made, CheckedMTPDrafter):
            made = MTPDrafter(ranks.decoder, self.cache)
        elif isinstance(made, AdaptiveDrafter):
            made = AdaptiveDrafter(NGramDrafter(shortest=1), MTPDrafter(ranks.decoder, self.cache))
        self.engine = Engine(ranks.decoder, self.cache, drafter=made, pipeline=ranks.pipeline, **options)


class RanksWorkload(InRanks, Workload):
    """Of a model whose layers all attend, in two ranks."""


class RanksHybridWorkload(InRanks, HybridWorkload):
    """Of models with a recurrent layer, in two ranks."""
