"""The C++ extension: whether it is here, and which instruction set its kernels run on."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch  # first: the extension then shares torch's OpenMP threads

from latentkv.errors import ConfigError

try:
    # By name, because an import of the package itself would run against the layers.
    extension: Any = import_module("latentkv._native")  # None where it was not built
except ImportError as error:
    extension, _import_error = None, str(error)
else:
    _import_error = ""

Backend = Literal["torch", "triton", "portable", "avx2", "avx512", "avx512bf16", "amx"]
"""What computes: torch alone, Triton's kernels (on a CPU through their interpreter, so only where they are named), or
the native kernels for one instruction set, ordered from slow to fast."""

_NOT_NATIVE = ("torch", "triton")

BF16_BACKENDS: tuple[Backend, ...] = ("avx512bf16", "amx")
"""Those that multiply pairs of bf16, and bytes (VNNI), as they are."""

ENVIRONMENT_VARIABLE = "LATENTKV_ISA"
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Element types as `csrc/dtypes.h` numbers them."""

_forced: ContextVar[Backend | None] = ContextVar("latentkv_backend", default=None)


@cache
def available_backends() -> tuple[Backend, ...]:
    """What may compute on this CPU without being named, best last."""
    if extension is None:
        return ("torch",)
    names = (name for name in get_args(Backend) if name not in _NOT_NATIVE)
    return ("torch", *(name for name in names if extension.runs(getattr(extension.Isa, name))))


def has_triton() -> bool:
    """Whether the package `triton` is installed; it is not imported before one of its kernels is to run."""
    return find_spec("triton") is not None


def why_no_extension() -> str:
    """Why the extension is missing; empty where it is here."""
    return _import_error


def named_backend() -> Backend | None:
    """The forced one, else the one that LATENTKV_ISA names; None where nobody named one."""
    return _forced.get() or _named_by_environment()


def current_backend() -> Backend:
    """The named one, else this CPU's best."""
    return named_backend() or available_backends()[-1]


def native_isa() -> Any | None:
    """The extension's number of the current instruction set; None where the extension is not to compute."""
    name = current_backend()
    return None if name in _NOT_NATIVE else _numbers()[name]


def has_int8_products() -> bool:
    """Whether attention over int8 pages may be computed in int8 products: the kernels for VNNI have them."""
    return current_backend() in BF16_BACKENDS


@contextmanager
def use_backend(backend: Backend) -> Generator[None]:
    """Compute with `backend` in this block (and this thread).

    Raises:
        ConfigError: it does not run here.
    """
    token = _forced.set(_require_available(backend, "backend"))
    try:
        yield
    finally:
        _forced.reset(token)


@cache
def _named_by_environment() -> Backend | None:
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    return _require_available(named, ENVIRONMENT_VARIABLE) if named else None


@cache
def _numbers() -> dict[str, Any]:
    return {name: getattr(extension.Isa, name) for name in available_backends() if name not in _NOT_NATIVE}


def _require_available(name: str, source: str) -> Backend:
    choices: tuple[Backend, ...] = (*available_backends(), "triton") if has_triton() else available_backends()
    for backend in choices:
        if backend == name:
            return backend
    raise ConfigError(f"{source}={name!r} does not run here; choose one of {', '.join(choices)}.")
