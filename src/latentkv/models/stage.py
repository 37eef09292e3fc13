"""`Stage`: the layers of a model that one process holds, and where a model may be cut into such."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from torch import nn

from latentkv.errors import ConfigError
from latentkv.models.config import ModelConfig

T = TypeVar("T")

_LIKE = 0.1
"""Part of the largest memory up to which two memories count as one size: what is free differs a little every time."""

_NONE = (math.inf, math.inf, 0)


@dataclass(frozen=True)
class Stage:
    """Layers `first` to `last` - 1 of a model of `num_layers`.

    The first stage has the embedding, the output head and the MTP modules beside them: it reads tokens and chooses
    them. Every stage has the final norm, which is small; the last one applies it.
    """

    first: int
    last: int
    num_layers: int

    @classmethod
    def whole(cls, num_layers: int) -> Stage:
        """The only stage of a model that is not cut."""
        return cls(0, num_layers, num_layers)

    @property
    def is_first(self) -> bool:
        """Whether it has the embedding and the output head."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """Whether what it gives are final hidden states."""
        return self.last == self.num_layers

    @property
    def is_whole(self) -> bool:
        """Whether it is the only one."""
        return self.is_first and self.is_last

    def own(self, of_layers: Sequence[T]) -> tuple[T, ...]:
        """Its own part of something that each layer has; what comes after the last layer (MTP's) is the first stage's.

        Args:
            of_layers: the layers' in their order, then perhaps one of an MTP module.
        """
        beside = of_layers[self.num_layers :] if self.is_first else ()
        return (*of_layers[self.first : self.last], *beside)

    def __str__(self) -> str:
        """In words: "layers 0-13"."""
        return f"layer {self.first}" if self.last == self.first + 1 else f"layers {self.first}-{self.last - 1}"


def cuts_of(config: ModelConfig) -> tuple[int, ...]:
    """Before which layers a model may be cut: nothing but the residual stream leads from the layer before into them."""
    return tuple(
        index
        for index, layer in enumerate(config.layers)
        if index and not layer.shares_selection and layer.shortcut != "ends"
    )


def cut(config: ModelConfig, sizes: Sequence[int], beside: int, memories: Sequence[int]) -> tuple[Stage, ...]:
    """The stages of a model, one for each memory, cut so that the fullest memory is as empty as it can be.

    Args:
        config: the model.
        sizes: bytes of each layer, its cache included.
        beside: bytes that the first stage has beside its layers.
        memories: bytes that each process may fill, in the order of the stages.

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
    rooms = [max(round(memory / most / _LIKE), 1) for memory in memories]
    before = [0]
    for size in sizes:
        before.append(before[-1] + size)
    # best[k][j], where the first k stages end at allowed[j]: how full the fullest of them is, and then how uneven all
    # are, and where the k-th begins.
    best: list[dict[int, tuple[float, float, int]]] = [{0: (0.0, 0.0, 0)}]
    for stage, room in enumerate(rooms):
        found: dict[int, tuple[float, float, int]] = {}
        for begin, (fullest, uneven, _) in best[-1].items():
            for end in range(begin + 1, len(allowed)):
                held = before[allowed[end]] - before[allowed[begin]] + (0 if stage else beside)
                full = held / room
                found[end] = min(found.get(end, _NONE), (max(fullest, full), uneven + full**2, begin))
        best.append(found)
    ends = [len(allowed) - 1]
    for stage in range(count, 0, -1):
        ends.append(best[stage][ends[-1]][-1])
    bounds = [allowed[end] for end in reversed(ends)]
    return tuple(Stage(first, last, config.num_layers) for first, last in pairwise(bounds))


class Absent(nn.Module):
    """In the place of a module that another process has."""
