"""What the tests of Triton's kernels run on: its interpreter where there is no GPU, a GPU with `-m gpu`."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from latentkv.kernels import has_triton, use_backend
from latentkv.ops.triton.launch import Launch
from triton_interpreter import patch_language_once

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return _device_or_skip(request.param)


@pytest.fixture
def run(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls an op on the device, through Triton's kernels and nothing else, and brings back what it returns."""
    if device.type == "cpu":
        _sum_rows_alike(monkeypatch)
        patch_language_once(monkeypatch)
    launched: list[str] = []
    launch = Launch.run

    def counted(self: Launch) -> None:
        launched.append(self.kernel.__name__)
        launch(self)

    monkeypatch.setattr(Launch, "run", counted)

    def call(op: Callable[..., Any], *args: Any, launches: bool = True, **options: Any) -> Any:
        launched.clear()
        moved = [_to(arg, device) for arg in args]
        with use_backend("triton"), np.errstate(all="ignore"):  # the interpreter computes with numpy
            result = op(*moved, **{name: _to(value, device) for name, value in options.items()})
        assert bool(launched) == launches
        for arg, copy in zip(args, moved, strict=True):
            if isinstance(arg, Tensor) and copy is not arg:
                arg.copy_(copy)  # what was written in place
        return tuple(t.cpu() for t in result) if isinstance(result, tuple) else _to(result, torch.device("cpu"))

    return call


def _sum_rows_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the interpreter's products computed in float64, then rounded.

    A GPU sums every row of a block in the same order. What BLAS does for a row in float32 depends on the processor and
    on where in the block the row lies, and shows in the last bit; in float64 it is far below what rounding keeps.
    """
    from triton.runtime import interpreter

    def matmul(a: Any, b: Any, dtype: Any = np.float32) -> Any:
        return np.matmul(a, b, dtype=np.float64).astype(dtype)

    monkeypatch.setattr(interpreter, "np", SimpleNamespace(**{**vars(np), "matmul": matmul}))


def _to(value: Any, device: torch.device) -> Any:
    """Slices stay slices: their whole memory moves."""
    if not isinstance(value, Tensor) or value.device == device:
        return value
    numbers = value.untyped_storage().nbytes() // value.itemsize
    whole = value.as_strided((numbers,), (1,), 0).to(device)
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())


def _device_or_skip(name: str) -> torch.device:
    if not has_triton():
        pytest.skip("triton is not installed: pip install 'latentkv[gpu]'")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    if name == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter stands in where there is no GPU: pytest -m gpu")
    return torch.device(name)
