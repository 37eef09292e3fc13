"""`AdaptiveDrafter`: drafts as long as they pay, and none where they do not."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from latentkv.engine.drafts import Drafter, Wish
from latentkv.engine.sequence import Sequence

PLAIN_EVERY = 32
"""Steps of which one drafts nothing, to measure what a step without drafts takes."""

_SHORT = 8  # rows of a step
_FADING = 0.95  # of the memory of acceptance, at every draft
_TRYING = 0.1, 0.01  # of the time goes into drafts by drafters that do not pay, at first and later

_Plan = tuple[float, int]  # tokens a time (1: as without drafts), tokens of the draft
_NO_DRAFT: _Plan = (1.0, 0)


class AdaptiveDrafter:
    """Chooses, for every sequence and step, who drafts and how many tokens.

    If each token of a draft is accepted with chance p where those before it were, k of them bring 1 + p + ... + p^k
    tokens in one step; if each costs c, the step takes 1 + k c times as long as without them. The drafter and the k of
    the largest quotient are taken, and no draft where none is above 1.

    p is how often the drafter's tokens were accepted in the sequence lately. c is measured: what drafting and reading a
    token has lately added to a step, as a share of the time of a token without drafts. A drafter that does not pay is
    tried with a single token now and then, more and more rarely, at last for a hundredth of the time.

    Args:
        drafters: who can draft; one that has nothing to propose leaves it to the next best.
    """

    def __init__(self, *drafters: Drafter) -> None:
        self._sources = [_Source(drafter) for drafter in drafters]
        self._histories: WeakKeyDictionary[Sequence, _History] = WeakKeyDictionary()
        self._plain: dict[int, _Recent] = {}  # seconds of a step without drafts, by its number of sequences
        self._reading = _Recent(0.3)  # of a drafted token, as a share of a token's time without drafts
        self._recorded: set[tuple[int, int]] = set()  # sequences and drafted tokens of small steps that there were
        self._steps = 0

    def propose(self, wishes: SequenceOf[Wish], seconds: float) -> list[list[int]]:
        """See `Drafter`."""
        histories = [self._learn(wish) for wish in wishes]
        decoding = all(wish.decoded for wish in wishes)
        if decoding:
            self._measure(wishes, seconds)
        plain = self._plain.get(len(wishes)) if decoding else None
        self._steps += 1
        if plain is None or self._steps % PLAIN_EVERY == 0:
            plans = [[_NO_DRAFT] * len(self._sources)] * len(wishes)
        else:
            plans = [self._plan(wish, history) for wish, history in zip(wishes, histories, strict=True)]
        return self._ask(wishes, histories, plans, seconds, None if plain is None else plain.value / len(wishes))

    def forget(self, sequence: Sequence) -> None:
        """See `Drafter`; how its drafts fared is remembered."""
        for source in self._sources:
            source.drafter.forget(sequence)

    def _learn(self, wish: Wish) -> _History:
        """Of what became of a sequence's draft."""
        history = self._histories.get(wish.sequence)
        if history is None:
            history = _History([_Acceptance(2 * source.overall.rate, 2) for source in self._sources])
            self._histories[wish.sequence] = history
        for acceptance in history.acceptances:
            acceptance.rest = max(acceptance.rest - 1, 0)
        if wish.drafted:
            source, acceptance = self._sources[history.source], history.acceptances[history.source]
            acceptance.learn(wish.drafted, wish.accepted)
            source.overall.learn(wish.drafted, wish.accepted)
            cost = source.cost(self._reading.value)
            # One that was right is followed by another, unless they cost more than they can bring.
            if not wish.accepted or cost >= 1:
                acceptance.rest_for(cost)
        return history

    def _measure(self, wishes: SequenceOf[Wish], seconds: float) -> None:
        """Learn of what a step took in which every sequence read one token and its draft."""
        sequences, drafted = len(wishes), sum(wish.drafted for wish in wishes)
        size = sequences, drafted
        if sum(size) <= _SHORT and size not in self._recorded:
            # The first step of a size is recorded, which takes longer; where it is short, that shows.
            self._recorded.add(size)
        elif drafted == 0:
            # Few, for they are rare where drafts pay, and must keep up with a machine that slows down.
            self._plain.setdefault(sequences, _Recent(seconds, most=3)).add(seconds)
        elif sequences in self._plain:
            self._reading.add((seconds / self._plain[sequences].value - 1) * sequences / drafted)

    def _plan(self, wish: Wish, history: _History) -> list[_Plan]:
        reading = self._reading.value
        return [
            source.plan(acceptance, wish.most, reading)
            for source, acceptance in zip(self._sources, history.acceptances, strict=True)
        ]

    def _ask(
        self,
        wishes: SequenceOf[Wish],
        histories: list[_History],
        plans: list[list[_Plan]],
        seconds: float,
        token_seconds: float | None,
    ) -> list[list[int]]:
        """Drafts by who has the best plan for each sequence, or the best of those that are left.

        Args:
            wishes: what the step has left; `most` is set to what a drafter is asked for.
            histories: of each sequence.
            plans: of each sequence, one a source.
            seconds: as in `propose`.
            token_seconds: time of a token without drafts; None where it is not known.
        """
        drafts: list[list[int]] = [[] for _ in wishes]
        for i, source in enumerate(self._sources):
            steady = True  # who has long drafted nothing takes longer
            for wish, draft, plan in zip(wishes, drafts, plans, strict=True):
                wish.most = 0 if draft or plan[i] < max(plan[i:]) else plan[i][1]
                steady = steady and (wish.drafted > 0 or wish.most == 0)
            began = time.perf_counter()
            proposed = source.drafter.propose(wishes, seconds)
            took, tokens = time.perf_counter() - began, sum(map(len, proposed))
            if tokens and token_seconds and steady:
                source.drafting.add(took / tokens / token_seconds)
            for j, draft in enumerate(proposed):
                if draft:
                    drafts[j], histories[j].source = draft, i
        return drafts


class _Recent:
    """The median of the last few of some numbers."""

    def __init__(self, initial: float, *, most: int = 5) -> None:
        self.value = initial
        self._numbers: deque[float] = deque(maxlen=most)

    def add(self, number: float) -> None:
        self._numbers.append(number)
        self.value = sorted(self._numbers)[len(self._numbers) // 2]


@dataclass
class _Acceptance:
    """How often drafted tokens were accepted, those before them given; and when to try again if that is too rarely."""

    accepted: float = 1.0
    checked: float = 2.0
    rest: int = 0  # steps
    pause: int = 0  # the last rest

    @property
    def rate(self) -> float:
        return self.accepted / self.checked

    def learn(self, drafted: int, accepted: int) -> None:
        self.accepted = _FADING * self.accepted + accepted
        self.checked = _FADING * self.checked + min(accepted + 1, drafted)

    def rest_for(self, cost: float) -> None:
        """Rest after a token that did not pay: each time for longer, since the last one that did."""
        least, most = (round(min(cost, 4.0) / share) for share in _TRYING)
        self.rest = self.pause = min(max(2 * self.pause, least), most)


@dataclass
class _History:
    """Of one sequence.

    Attributes:
        acceptances: of each source's tokens.
        source: that the last draft is from.
    """

    acceptances: list[_Acceptance]
    source: int = 0


class _Source:
    """A drafter, what its tokens cost to draft (as a share of a token's time without drafts), and how they fare."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.drafting = _Recent(0.1)
        self.overall = _Acceptance()

    def plan(self, acceptance: _Acceptance, most: int, reading: float) -> _Plan:
        """The best draft of at most so many tokens, if reading one costs so much."""
        cost, rate = self.cost(reading), acceptance.rate
        if rate <= cost:  # then no draft pays, however long
            # But perhaps it would by now.
            return (math.inf, 1) if most > 0 and acceptance.rest == 0 else _NO_DRAFT
        acceptance.pause = 0
        best, expected = _NO_DRAFT, 1.0
        for tokens in range(1, most + 1):
            expected += rate**tokens
            best = max(best, (expected / (1 + tokens * cost), tokens))
        return best

    def cost(self, reading: float) -> float:
        """Of a token, drafted and read."""
        return max(self.drafting.value + reading, 0.0)
