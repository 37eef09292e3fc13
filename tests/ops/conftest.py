"""Fixtures of the ops' tests."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from latentkv.kernels import Backend, available_backends, use_backend


@pytest.fixture(params=available_backends(), scope="module")
def backend(request: pytest.FixtureRequest) -> Generator[Backend]:
    """Every test of a module that uses it runs on every instruction set that this machine has, and on torch."""
    with use_backend(request.param):
        yield request.param
