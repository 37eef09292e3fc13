"""The ranks of a model in one process: messages go through queues instead of a network, all else is as it is."""

from __future__ import annotations

import copy
from collections import deque
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

from engine_models import cache_for, tiny_decoder
from latentkv.errors import RankError
from latentkv.models.decoder import Decoder
from latentkv.models.stage import Stage, cuts_of
from latentkv.parallel import Pipeline, Ranks, StageLoop
from latentkv.parallel.messages import Message, message_of
from latentkv.state import PagedCache


class QueueRing:
    """A rank's place; the driver's has the others compute when it waits for what they give."""

    def __init__(self, rank: int, queues: list[deque[Message]]) -> None:
        self.rank, self.size = rank, len(queues)
        self.before, self.after = (rank - 1) % self.size, (rank + 1) % self.size
        self._queues = queues
        self.loops: list[StageLoop] = []

    def send(self, message: Message) -> None:
        self._queues[self.after].append(message_of(message.head(), message.body()))

    def receive(self) -> Message:
        while not self._queues[self.rank]:
            for loop, queue in zip(self.loops, self._queues[1:], strict=True):
                if queue:
                    loop.turn()
        return self._queues[self.rank].popleft()

    def arrived(self, number: int) -> None:
        pass

    def flush(self) -> None:
        pass


class LocalRanks:
    """A tiny model of a kind, cut into as many stages as may be, at most so many.

    Attributes:
        decoder: the driver's stage.
        cache: the driver's, of `num_pages` pages.
        pipeline: through the others.
        stages: the others' decoders.
    """

    def __init__(self, kind: str, num_ranks: int, num_pages: int, **sizes: Any) -> None:
        whole = cache_for(tiny_decoder(kind), num_pages, **sizes)
        decoders = _stages(kind, num_ranks)
        caches: list[PagedCache] = []
        for decoder in decoders:
            own = decoder.stage.own(whole.specs)
            made = PagedCache(
                own,
                num_pages,
                page_size=whole.page_size,
                num_slots=max(whole.num_slots, 1),
                model_specs=whole.specs,
            )
            for tensor in made.slot_storage:
                tensor.fill_(float("nan"))
            caches.append(made)
        queues: list[deque[Message]] = [deque() for _ in decoders]
        rings = [QueueRing(rank, queues) for rank in range(len(decoders))]
        self.decoder, *self.stages = decoders
        self.cache = caches[0]
        rings[0].loops = [
            StageLoop(decoder, own, cast(Any, ring))
            for decoder, own, ring in zip(decoders[1:], caches[1:], rings[1:], strict=True)
        ]
        ranks = SimpleNamespace(
            ring=rings[0],
            lost=None,
            loss=_itself,
            leave=_nothing,
        )
        self.pipeline = Pipeline(cast(Ranks, ranks))


@cache
def _stages(kind: str, num_ranks: int) -> list[Decoder]:
    whole = tiny_decoder(kind)
    bounds = [0, *cuts_of(whole.config)[: num_ranks - 1], whole.config.num_layers]
    found: list[Decoder] = []
    for first, last in pairwise(bounds):
        part = copy.deepcopy(whole)
        part.keep_stage(Stage(first, last, whole.config.num_layers))
        found.append(part)
    return found


def _itself(error: RankError) -> RankError:
    return error


def _nothing() -> None:
    pass
