"""`Stage`: what of a model one process holds, and where a model may be cut into such."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

from torch import nn

from latentkv.errors import ConfigError
from latentkv.models.config import ModelConfig
from latentkv.models.shard import WHOLE, Shard

T = TypeVar("T")

_LIKE = 0.1
"""Part of the largest memory up to which two memories count as one size: what is free differs a little every time."""

GROUP_ROWS = 4
"""Sequences of a group that is under way, about, by which stages are cut: of experts more are read with more rows."""

_FILLED = 0.9
"""Part of a memory that stages may fill to be fast: more is left for what is not counted."""

_NONE = (math.inf, math.inf, 0)


@dataclass(frozen=True)
class Stage:
    """Layers `first` to `last` - 1 of a model of `num_layers`, or a shard of each of them.

    The first stage has the embedding, the output head and the MTP modules beside them: it reads tokens and chooses
    them. Of its shards each has a part of the head, and the first one all the rest. Every stage has the final norm,
    which is small; the last one applies it.
    """

    first: int
    last: int
    num_layers: int
    shard: Shard = WHOLE

    @classmethod
    def whole(cls, num_layers: int) -> Stage:
        """The only stage of a model that is not cut."""
        return cls(0, num_layers, num_layers)

    @property
    def is_first(self) -> bool:
        """Whether it has the output head, or a shard of it."""
        return self.first == 0

    @property
    def reads_tokens(self) -> bool:
        """Whether it has the embedding, and the MTP modules."""
        return self.is_first and self.shard.is_first

    @property
    def is_last(self) -> bool:
        """Whether what it gives are final hidden states."""
        return self.last == self.num_layers

    @property
    def is_whole(self) -> bool:
        """Whether it is the only one."""
        return self.is_first and self.is_last and self.shard.is_whole

    def sharded(self, shard: Shard) -> Stage:
        """The shard of these layers."""
        return replace(self, shard=shard)

    def own(self, of_layers: Sequence[T]) -> tuple[T, ...]:
        """Its own part of something that each layer has; what comes after the last layer (MTP's) is the first stage's.

        Args:
            of_layers: the layers' in their order, then perhaps one of an MTP module.
        """
        beside = of_layers[self.num_layers :] if self.reads_tokens else ()
        return (*of_layers[self.first : self.last], *beside)

    def __str__(self) -> str:
        """In words: "layers 0-13", "part 1 of 2 of layers 0-13"."""
        layers = f"layer {self.first}" if self.last == self.first + 1 else f"layers {self.first}-{self.last - 1}"
        return layers if self.shard.is_whole else f"part {self.shard.index + 1} of {self.shard.count} of {layers}"


def cuts_of(config: ModelConfig) -> tuple[int, ...]:
    """Before which layers a model may be cut: nothing but the residual stream leads from the layer before into them."""
    return tuple(
        index
        for index, layer in enumerate(config.layers)
        if index and not layer.shares_selection and layer.shortcut != "ends"
    )


@dataclass(frozen=True)
class Weighed:
    """What layers weigh: each of them, and what the first stage has beside its own."""

    layers: Sequence[float]
    beside: float = 0

    def of(self, stage: Stage) -> float:
        """Of a stage."""
        return sum(stage.own(self.layers)) + (self.beside if stage.is_first else 0)


def cut(config: ModelConfig, size: Weighed, memories: Sequence[int], time: Weighed | None = None) -> tuple[Stage, ...]:
    """The stages of a model, one for each memory.

    Where they fit, the slowest stage is as fast as it can be, for it sets the pace of all; where they do not, or nobody
    says what takes how long, the fullest memory is as empty as it can be.

    Args:
        config: the model.
        size: bytes of each layer, its cache included.
        memories: bytes that each process may fill, in the order of the stages.
        time: that each layer takes in a step, in any unit.

    Raises:
        ConfigError: the model cannot be cut into so many stages.
    """
    allowed = [0, *cuts_of(config), config.num_layers]
    count = len(memories)
    if count >= len(allowed):
        raise ConfigError(
            f"This model can be cut into {len(allowed) - 1} stages at most, not {count}: use fewer ranks."
        )
    # Memories that are nearly alike count as alike, or stages would differ from start to start.
    most = max(*memories, 1)
    rooms = [max(round(memory / most / _LIKE), 1) * most * _LIKE for memory in memories]
    fast = None
    if time is not None:
        fast = _best(allowed, config.num_layers, [_Room(time, size, room * _FILLED) for room in rooms])
    return fast or _best(allowed, config.num_layers, [_Room(size, size, math.inf, room) for room in rooms]) or ()


@dataclass(frozen=True)
class _Room:
    """A process: what counts of its stage, over `per`, where that is no larger than `most`."""

    counted: Weighed
    size: Weighed
    most: float
    per: float = 1

    def full(self, stage: Stage) -> float:
        return self.counted.of(stage) / self.per if self.size.of(stage) <= self.most else math.inf


def _best(allowed: Sequence[int], num_layers: int, rooms: Sequence[_Room]) -> tuple[Stage, ...] | None:
    """Stages whose fullest is as empty as it can be; of several the most even ones. None: they do not fit."""
    # best[k][j], where the first k stages end at allowed[j]: how full the fullest of them is, and then how uneven all
    # are, and where the k-th begins.
    best: list[dict[int, tuple[float, float, int]]] = [{0: (0.0, 0.0, 0)}]
    for room in rooms:
        found: dict[int, tuple[float, float, int]] = {}
        for begin, (fullest, uneven, _) in best[-1].items():
            for end in range(begin + 1, len(allowed)):
                full = room.full(Stage(allowed[begin], allowed[end], num_layers))
                found[end] = min(found.get(end, _NONE), (max(fullest, full), uneven + full**2, begin))
        best.append(found)
    ends = [len(allowed) - 1]
    if best[-1][ends[0]][0] == math.inf:
        return None
    for stage in range(len(rooms), 0, -1):
        ends.append(best[stage][ends[-1]][-1])
    bounds = [allowed[end] for end in reversed(ends)]
    return tuple(Stage(first, last, num_layers) for first, last in pairwise(bounds))


class Absent(nn.Module):
    """In the place of a module that another process has."""
