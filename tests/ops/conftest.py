"""Fixtures of the ops' tests."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from latentkv.kernels import Isa, available_isas, use_isa


@pytest.fixture(params=available_isas(), scope="module")
def isa(request: pytest.FixtureRequest) -> Generator[Isa]:
    """Every test of a module that uses it runs on every instruction set that this machine has, and on torch."""
    with use_isa(request.param):
        yield request.param
