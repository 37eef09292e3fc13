"""`DataRanks`: processes that train one model together, each with its part of every batch and of the weights.

The parts are torch's: `fully_shard` (FSDP2) gives every process some rows of every weight, gathers a layer's while it
computes, and adds the gradients up. What is here is what a training loop needs besides.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from latentkv.errors import RankError
from latentkv.models.decoder import Decoder
from latentkv.parallel import Ranks, join
from latentkv.parallel.process import share_cores, world_size

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")

_GLOO = "gloo"
"""Stands in what torch says of a connection that has ended."""

TIMEOUT = 120.0
"""Seconds without a word of a process after which it is given up."""


class DataRanks:
    """The processes that torchrun has started; where it has started none, this one alone, for which nothing is done."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        self._ranks = ranks
        self.rank, self.size = (ranks.rank, ranks.size) if ranks else (0, 1)

    @classmethod
    def join(cls, *, trust_network: bool = False) -> DataRanks:
        """Take part in those that torchrun has started.

        Raises:
            ConfigError: they would talk over an address that anybody can reach, or not all have come.
        """
        if world_size() == 1:
            return cls()
        share_cores()
        return cls(join(world_size(), timeout=TIMEOUT, trust_network=trust_network))

    @property
    def is_first(self) -> bool:
        """Whether this process reports and writes what is there once."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Generator[None]:
        """Work of all processes: when one of them is gone, whatever the others wait for ends in one sentence.

        Raises:
            RankError: one of them is gone.
        """
        try:
            yield
        except BaseException as error:
            if self._ranks is None:
                raise
            if isinstance(error, RuntimeError) and _GLOO in str(error):
                raise self._ranks.culprit(RankError(0 if self.rank else 1, "is gone, or another one")) from error
            self._ranks.give_up(error)
            raise

    def leave(self) -> None:
        """Wait for the others, and part."""
        if self._ranks:
            self.wait()
            self._ranks.leave()

    def wait(self) -> None:
        """Until all have come here."""
        if self._ranks:
            dist.barrier()

    @contextmanager
    def first_alone(self) -> Generator[None]:
        """Let the first process do something before the others do, who then find it done."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def shard(self, model: Decoder, dtype: torch.dtype) -> None:
        """Leave this process its rows of every float32 weight; layers compute in `dtype`."""
        if not self._ranks:
            return
        # Imported here because it is slow to import and only this needs it.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh("cpu", (self.size,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for part in (*model.model.layers, *model.mtp):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        for layer in model.model.layers:
            register_fsdp_forward_method(layer, "attend_whole")
        for method in ("forward_train", "logits", "mtp_hidden", "attention_outputs"):
            register_fsdp_forward_method(model, method)

    def from_first(self, make: Callable[[], Tensor]) -> Tensor:
        """What the first process makes, an int64 matrix; the others are given it."""
        made = make() if self.is_first else torch.empty(0, 0, dtype=torch.int64)
        if self._ranks:
            shape = torch.tensor(made.shape)
            dist.broadcast(shape, 0)
            made = made if self.is_first else torch.empty(*shape.tolist(), dtype=torch.int64)
            dist.broadcast(made, 0)
        return made

    def own(self, shared: Sequence[T]) -> Sequence[T]:
        """Of what is to be done, such as a step's micro-batches, what this process does."""
        return shared[self.rank :: self.size]

    def mean(self, numbers: Tensor) -> Tensor:
        """Of what all processes have."""
        return self.total(numbers) / self.size if self._ranks else numbers

    def total(self, numbers: Tensor) -> Tensor:
        """Of what all processes have."""
        if self._ranks:
            dist.all_reduce(numbers)
        return numbers

    def any(self, said: bool) -> bool:
        """Whether one of the processes says so; each has to say."""
        return bool(self.total(torch.tensor(float(said))))

    def agree(self, *, stop: bool, elapsed: float, due: bool) -> tuple[bool, float, bool]:
        """Whether one of them is to stop, how long the first one has trained, and whether something is due there."""
        if not self._ranks:
            return stop, elapsed, due
        said = torch.tensor(
            [float(stop), *((elapsed, float(due)) if self.is_first else (0.0, 0.0))], dtype=torch.float64
        )
        dist.all_reduce(said)
        return bool(said[0]), float(said[1]), bool(said[2])


def shared_out(tensor: Tensor) -> DTensor | None:
    """A weight whose rows several processes have; None for any other."""
    # Slow to import, and where nobody has imported it there are none.
    module = sys.modules.get("torch.distributed.tensor")
    return cast("DTensor", tensor) if module is not None and isinstance(tensor, module.DTensor) else None


def whole(tensor: Tensor) -> Tensor:
    """A weight with the rows of all processes, each of which calls this."""
    shared = shared_out(tensor)
    return tensor if shared is None else shared.full_tensor()


def rows_of(length: int, rank: int, size: int) -> tuple[int, int]:
    """Which rows, from one up to another, of a weight of so many a process has: equal parts, the last ones smaller."""
    part = -(-length // size)  # as torch.chunk has it
    return min(rank * part, length), min((rank + 1) * part, length)


def own_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows of a weight that are here, to be read and written in place, and the number of the first one."""
    shared = shared_out(tensor)
    if shared is None:
        return tensor, 0
    mesh = shared.device_mesh
    return shared.to_local(), rows_of(tensor.shape[0], mesh.get_rank(), mesh.size())[0]


def number_of(value: Tensor) -> float:
    """A number that all processes have computed together."""
    return float(whole(value))
