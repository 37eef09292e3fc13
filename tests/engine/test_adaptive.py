"""Drafts are made as long as they pay, on a simulated model: a step takes 1 second, and a drafted token `cost` more."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch

from latentkv.engine.adaptive import PLAIN_EVERY, AdaptiveDrafter
from latentkv.engine.drafts import Wish
from latentkv.engine.sequence import Sequence

MOST = 4


@dataclass
class Always:
    """Drafts what it is asked for, all of one token."""

    token: int = 0
    asked: list[int] = field(default_factory=list[int])

    def propose(self, wishes: list[Wish], seconds: float) -> list[list[int]]:
        self.asked += [wish.most for wish in wishes]
        return [[self.token] * wish.most for wish in wishes]

    def forget(self, sequence: Sequence) -> None:
        pass


class Silent(Always):
    """Never knows anything."""

    def propose(self, wishes: list[Wish], seconds: float) -> list[list[int]]:
        return [[] for _ in wishes]


class Simulation:
    """Sequences whose drafted tokens are accepted with a chance that depends on who drafted them."""

    def __init__(self, *drafters: Always, sequences: int = 1) -> None:
        self.drafter = AdaptiveDrafter(*drafters)
        self.drafts: dict[Sequence, list[int]] = {Sequence(i, [0]): [] for i in range(sequences)}
        self.random = random.Random(0)
        self.tokens, self.seconds = 0, 0.0
        self.lengths: list[int] = []

    def step(self, chances: dict[int, float], cost: float, slowness: float = 1.0) -> None:
        drafted = sum(map(len, self.drafts.values()))
        seconds = 1 + cost * drafted / len(self.drafts)
        wishes = [self.checked(sequence, draft, chances) for sequence, draft in self.drafts.items()]
        self.lengths.append(drafted)
        self.seconds += seconds
        self.tokens += sum(1 + wish.accepted for wish in wishes)
        self.drafts = dict(zip(self.drafts, self.drafter.propose(wishes, seconds * slowness), strict=True))

    def checked(self, sequence: Sequence, draft: list[int], chances: dict[int, float]) -> Wish:
        accepted = 0
        while accepted < len(draft) and self.random.random() < chances[draft[accepted]]:
            accepted += 1
        return Wish(
            sequence, torch.zeros(1 + accepted, 1), MOST, lambda draft, logits: 0, drafted=len(draft), accepted=accepted
        )

    def run(self, chance: float, cost: float, steps: int = 1000) -> Simulation:
        for _ in range(steps):
            self.step({0: chance}, cost)
        return self

    @property
    def seconds_per_token(self) -> float:
        return self.seconds * len(self.drafts) / self.tokens


def best(chance: float, cost: float) -> float:
    """Seconds a token with drafts of the best fixed length."""
    return min((1 + k * cost) / sum(chance**i for i in range(k + 1)) for k in range(MOST + 1))


@pytest.mark.parametrize("chance", [0, 0.2, 0.5, 0.8, 1])
@pytest.mark.parametrize("cost", [0.02, 0.3, 0.7, 1.5, 4])
@pytest.mark.parametrize("sequences", [1, 5])
def test_it_is_about_as_fast_as_the_best_fixed_draft_and_none(chance: float, cost: float, sequences: int) -> None:
    simulation = Simulation(Always(), sequences=sequences).run(chance, cost)
    assert simulation.seconds_per_token <= 1.08 * best(chance, cost)
    assert simulation.seconds_per_token <= 1.05  # the first steps, in which costs are not known yet, included


@pytest.mark.parametrize("chance", [0.2, 0.8])
@pytest.mark.parametrize("cost", [0.2, 0.9])
def test_a_machine_that_slows_down_for_a_while_and_hiccups_misleads_it_little(chance: float, cost: float) -> None:
    simulation, noise = Simulation(Always()), random.Random(1)
    for step in range(3000):
        slowness = (1 if step // 300 % 2 else 2) * (1 + 0.3 * noise.random()) * (10 if noise.random() < 0.03 else 1)
        simulation.step({0: chance}, cost, slowness)
    assert simulation.seconds_per_token <= 1.15 * best(chance, cost)
    assert simulation.seconds_per_token <= 1.05


def test_drafts_are_long_where_all_are_right_and_short_where_half_are() -> None:
    assert set(Simulation(Always()).run(1, 0.1).lengths[100:]) == {0, MOST}
    lengths = Simulation(Always()).run(0.5, 0.3).lengths[100:]
    assert 0.5 < sum(lengths) / len(lengths) < 2


def test_one_step_of_many_drafts_nothing_to_measure_what_that_takes() -> None:
    lengths = Simulation(Always()).run(1, 0.1).lengths[100:]
    assert lengths.count(0) == pytest.approx(len(lengths) / PLAIN_EVERY, abs=1)


def test_a_text_that_begins_to_be_foreseeable_is_drafted_again() -> None:
    simulation = Simulation(Always()).run(0, 0.3)
    before = len(simulation.lengths)
    simulation.run(1, 0.3, 100)
    assert sum(simulation.lengths[before + 60 :]) > 0.8 * 40 * MOST


def test_steps_that_become_dear_are_noticed() -> None:
    simulation = Simulation(Always()).run(0.7, 0.05)
    assert sum(simulation.lengths[-100:]) > 300
    simulation.run(0.7, 3)
    assert sum(simulation.lengths[-500:]) < 20


def test_the_better_drafter_drafts() -> None:
    simulation = Simulation(Always(0), Always(1))
    for _ in range(500):
        simulation.step({0: 0.3, 1: 0.9}, 0.1)
    first, second = (source.drafter for source in simulation.drafter._sources)  # pyright: ignore[reportPrivateUsage]
    assert sum(second.asked[200:]) > 20 * sum(first.asked[200:])


def test_one_that_has_nothing_to_propose_leaves_it_to_the_other() -> None:
    simulation = Simulation(Silent(0), Always(1))
    for _ in range(200):
        simulation.step({1: 1.0}, 0.1)
    assert sum(simulation.lengths[100:]) > 95 * MOST


def test_no_more_is_drafted_than_is_wanted() -> None:
    drafter = AdaptiveDrafter(Always())
    sequence = Sequence(0, [0])
    draft: list[int] = []
    for _ in range(50):
        wish = Wish(sequence, torch.zeros(1 + len(draft), 1), 1, lambda draft, logits: 0, len(draft), len(draft))
        (draft,) = drafter.propose([wish], 1.0)
        assert len(draft) <= 1
