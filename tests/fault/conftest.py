from __future__ import annotations

from collections.abc import Generator

import pytest

from latentkv import LLM
from live_server import Live, serving


@pytest.fixture(scope="session")
def reference() -> LLM:
    """The served model once more, to ask directly."""
    return LLM(dtype="fp32", kv_cache_bytes=16 << 20)


@pytest.fixture(scope="session")
def live() -> Generator[Live]:
    with serving(LLM(dtype="fp32", kv_cache_bytes=16 << 20, step_seconds=0.25)) as server:
        yield server


@pytest.fixture
def own() -> Generator[Live]:
    """A server that a test may break."""
    with serving(LLM(dtype="fp32", kv_cache_bytes=16 << 20, step_seconds=0.25), drain_seconds=0) as server:
        yield server
