from __future__ import annotations

from collections.abc import Iterator

import pytest

from latentkv import LLM
from live_server import Live, serving


@pytest.fixture
def own() -> Iterator[Live]:
    """A server that a test may break."""
    with serving(LLM(dtype="fp32", kv_cache_bytes=16 << 20, step_seconds=0.25), drain_seconds=0) as server:
        yield server
