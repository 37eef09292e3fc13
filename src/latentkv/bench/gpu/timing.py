"""Timing work on a GPU: events in its stream, contenders in turn; and the ceilings, timed in turn with them."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version

import torch

from latentkv.bench.timing import Timing
from latentkv.errors import RequestError

Step = Callable[[], object]
COPY, MATMUL = "copy ceiling", "bf16 ceiling"


@dataclass(frozen=True)
class GpuEnvironment:
    """The GPU and the software.

    Attributes:
        gpu: its name.
        python: version.
        torch: version, with that of CUDA or ROCm.
        triton: version.
    """

    gpu: str
    python: str
    torch: str
    triton: str


def describe_gpu(device: torch.device) -> GpuEnvironment:
    """What is here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"no GPU, {device}"
    return GpuEnvironment(name, platform.python_version(), torch.__version__, version("triton"))


def time_on(device: torch.device, steps: Mapping[str, Step], *, repeats: int, calls: int = 1) -> dict[str, Timing]:
    """Time every step `repeats` times, A B C, A B C, ... after two untimed rounds.

    Args:
        device: where the steps compute.
        steps: what to time, by name.
        repeats: timed rounds, at least 1.
        calls: how often a step is called in a round: as many calls are queued before the GPU is waited for.

    Returns:
        Seconds a call.

    Raises:
        RequestError: `repeats` or `calls` < 1.
    """
    if repeats < 1 or calls < 1:
        raise RequestError(f"repeats and calls must be at least 1, not {repeats} and {calls}.")
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(-2, repeats):
        for name, step in steps.items():
            seconds = _seconds(device, step, calls)
            if index >= 0:
                samples[name].append(seconds / calls)
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


class GpuCeilings:
    """A bf16 matrix product and a copy, as steps to be timed in turn with what is compared with them.

    Args:
        device: the GPU.
        gemm_size: M = N = K of the product.
        buffer_mib: MiB of the buffer that is copied: several times the GPU's cache.
    """

    def __init__(self, device: torch.device, *, gemm_size: int = 8192, buffer_mib: int = 1024) -> None:
        left = torch.randn(gemm_size, gemm_size, device=device).bfloat16()
        right = left.flip(0).contiguous()
        source = torch.zeros(buffer_mib << 20, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        self._flops, self._bytes = 2 * gemm_size**3, 2 * source.nbytes
        self.steps: dict[str, Step] = {MATMUL: lambda: left @ right, COPY: lambda: target.copy_(source)}

    def rates(self, timings: Mapping[str, Timing]) -> tuple[float, float]:
        """TFLOP/s of the product, and GB/s of the copy (bytes read and bytes written)."""
        return self._flops / timings[MATMUL].median / 1e12, self._bytes / timings[COPY].median / 1e9


def _seconds(device: torch.device, step: Step, calls: int) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(calls):
            step()
        return time.perf_counter() - started
    with torch.cuda.device(device):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1e3
