"""One kernel launch as a value: the code that computes runs it, a test compiles it for GPUs that are not here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_INTERPRETED_PARTS = 3


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that it is called with.

    Attributes:
        kernel: a function under `triton.jit`.
        grid: programs along each axis; nothing is launched where one of them is 0.
        args: what the kernel reads while it runs, by position; the first tensor says on which GPU.
        constants: its `tl.constexpr` parameters, by name.
        num_warps: warps of a program.
        num_stages: blocks of a loop that are under way at once.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: Mapping[str, Any] = field(default_factory=dict[str, Any])
    num_warps: int = 4
    num_stages: int = 1

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told beside the constants.

        It must not fuse sums with products: it can in some loops only, and the last bits would tell which one a token
        went through, and so what else is in the batch.
        """
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}

    def run(self) -> None:
        """Put it into the current stream's queue (through the interpreter: compute it)."""
        if 0 not in self.grid:
            with torch.cuda.device_of(next(arg for arg in self.args if isinstance(arg, Tensor))):
                self.kernel[self.grid](*self.args, **self.constants, **self.options)


def parts_of(device: torch.device) -> int:
    """Programs that run side by side on a GPU at least: its multiprocessors."""
    if device.type != "cuda":
        return _INTERPRETED_PARTS
    return torch.cuda.get_device_properties(device).multi_processor_count
