"""What this machine can do at most, measured in the same run as whatever is compared with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from latentkv.bench.environment import Environment
from latentkv.bench.timing import Contender, Timing, time_interleaved, torch_threads
from latentkv.errors import RequestError

Step = Callable[[], object]


READERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda buffer: buffer.sum(),
    "maximum": lambda buffer: buffer.amax(),
    "dot product with itself": lambda buffer: torch.dot(buffer, buffer),
}
"""Plain operations that read a buffer once; which of them is the fastest depends on the machine."""

_TRIAL_SIZE = 256
_LONGEST = 1.0
"""Seconds that a product may take; where torch computes it without the processor's help, smaller matrices will do."""


@dataclass(frozen=True)
class _Product:
    """A matrix product and the operations that it takes."""

    step: Step
    operations: int


@dataclass(frozen=True)
class Ceilings:
    """Medians of the fastest plain operations that torch has here (1 GFLOP/s = 1e9 FLOP/s, 1 GB = 1e9 B).

    Attributes:
        threads: torch threads used.
        bf16_gflops: product of bf16 matrices, GFLOP/s: by float32 where torch has no fast product of bf16.
        fp32_gflops: fp32 matrix product, GFLOP/s.
        int8_gops: int8 matrix product with int32 sums, 1e9 operations a second.
        read_gbps: reading a buffer much larger than the last-level cache, GB/s: the fastest of `READERS`.
        one_thread_bf16_gflops: bf16 matrix product on one thread.
        one_thread_read_gbps: reading on one thread.
        spread: interquartile range over the median of each, by field name.
    """

    threads: int
    bf16_gflops: float
    fp32_gflops: float
    int8_gops: float
    read_gbps: float
    one_thread_bf16_gflops: float
    one_thread_read_gbps: float
    spread: dict[str, float]


@dataclass(frozen=True)
class CeilingsReport:
    """The ceilings and where they were measured."""

    environment: Environment
    ceilings: Ceilings


def measure_ceilings(
    *, gemm_size: int = 3072, buffer_mib: int = 512, repeats: int = 7, threads: int | None = None
) -> Ceilings:
    """Measure the ceilings, interleaved.

    Args:
        gemm_size: M = N = K of the square matrix products.
        buffer_mib: MiB of the buffer that is read; several times the last-level cache.
        repeats: timed rounds of each.
        threads: torch threads (None: torch's own number).

    Raises:
        RequestError: a size, `repeats` or `threads` is below 1.
    """
    if gemm_size < 1 or buffer_mib < 1:
        raise RequestError(f"gemm_size and buffer_mib must be at least 1, not {gemm_size} and {buffer_mib}.")
    with torch_threads(threads) as used, torch.inference_mode():
        buffer = torch.ones(buffer_mib << 20 >> 2, dtype=torch.float32)
        products, readers = _products(gemm_size), _readers(buffer)
        steps = {name: product.step for name, product in products.items()}
        timings = time_interleaved(
            {
                **_on_threads(steps | readers, used),
                **_on_threads({f"one thread, {n}": s for n, s in ({"bf16": steps["bf16"]} | readers).items()}, 1),
            },
            repeats=repeats,
        )
    found = {
        "bf16_gflops": (products["bf16"].operations, timings["bf16"]),
        "fp32_gflops": (products["fp32"].operations, timings["fp32"]),
        "int8_gops": (products["int8"].operations, timings["int8"]),
        "read_gbps": (buffer.nbytes, _fastest(timings[name] for name in READERS)),
        "one_thread_bf16_gflops": (products["bf16"].operations, timings["one thread, bf16"]),
        "one_thread_read_gbps": (buffer.nbytes, _fastest(timings[f"one thread, {name}"] for name in READERS)),
    }
    rates = {name: work / timing.median / 1e9 for name, (work, timing) in found.items()}
    return Ceilings(threads=used, spread={name: timing.spread for name, (_, timing) in found.items()}, **rates)


class CeilingProbe:
    """The bf16 and the read ceiling, timed in turn with what is compared with them: a machine's speed drifts.

    Args:
        gemm_size: M = N = K of the square matrix product.
        buffer_mib: MiB of the buffer that is read.
    """

    def __init__(self, *, gemm_size: int = 3072, buffer_mib: int = 256) -> None:
        buffer = torch.ones(buffer_mib << 20 >> 2, dtype=torch.float32)
        readers = {name: Contender(step) for name, step in _readers(buffer).items()}
        timings = time_interleaved(readers, repeats=3, warmup=1)
        fastest = min(timings, key=lambda name: timings[name].median)
        product = _bf16_product(gemm_size)
        self._bytes, self._flops = buffer.nbytes, product.operations
        self.contenders = {
            "bf16 ceiling": Contender(product.step),
            "read ceiling": readers[fastest],
        }

    def rates(self, timings: Mapping[str, Timing]) -> tuple[float, float]:
        """GFLOP/s of the bf16 product and GB/s of reading, from the timings of `contenders` among others."""
        return (
            self._flops / timings["bf16 ceiling"].median / 1e9,
            self._bytes / timings["read ceiling"].median / 1e9,
        )


def multiplies_bf16_fast() -> bool:
    """Whether torch multiplies bf16 matrices faster than float32 ones: not where the processor has no such product."""
    left, right = _matrices(_TRIAL_SIZE)
    left_bf16, right_bf16 = left.bfloat16(), right.bfloat16()
    steps = {"bf16": lambda: left_bf16 @ right_bf16, "fp32": lambda: left @ right}
    timings = time_interleaved({name: Contender(step) for name, step in steps.items()}, repeats=3, warmup=1)
    return timings["bf16"].median < timings["fp32"].median


def _products(size: int) -> dict[str, _Product]:
    return {
        "bf16": _bf16_product(size),
        "fp32": _product(size, lambda left, right: lambda: left @ right),
        "int8": _product(size, _int8_step),
    }


def _bf16_product(size: int) -> _Product:
    fast = multiplies_bf16_fast()
    return _product(size, _bf16_step if fast else lambda left, right: lambda: (left @ right).bfloat16())


def _bf16_step(left: Tensor, right: Tensor) -> Step:
    left_bf16, right_bf16 = left.bfloat16(), right.bfloat16()
    return lambda: left_bf16 @ right_bf16


def _int8_step(left: Tensor, right: Tensor) -> Step:
    left_int8, right_int8 = (left * 40).to(torch.int8), (right * 40).to(torch.int8)
    return lambda: torch.ops.aten._int_mm(left_int8, right_int8)


def _product(size: int, step: Callable[[Tensor, Tensor], Step]) -> _Product:
    """Of square matrices of that size, or of the trial's where more would take too long."""
    if size > _TRIAL_SIZE:
        trial = Contender(step(*_matrices(_TRIAL_SIZE)))
        seconds = min(time_interleaved({"trial": trial}, repeats=2, warmup=1)["trial"].seconds)
        if seconds * (size / _TRIAL_SIZE) ** 3 > _LONGEST:
            size = _TRIAL_SIZE
    return _Product(step(*_matrices(size)), 2 * size**3)


def _matrices(size: int) -> tuple[Tensor, Tensor]:
    left = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    return left, left.flip(0).contiguous()


def _readers(buffer: Tensor) -> dict[str, Step]:
    return {name: lambda read=read: read(buffer) for name, read in READERS.items()}


def _on_threads(steps: Mapping[str, Step], threads: int) -> dict[str, Contender]:
    return {name: Contender(step, prepare=lambda: torch.set_num_threads(threads)) for name, step in steps.items()}


def _fastest(timings: Iterable[Timing]) -> Timing:
    return min(timings, key=lambda timing: timing.median)
