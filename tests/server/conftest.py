from __future__ import annotations

from collections.abc import Generator

import openai
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
def client(live: Live) -> Generator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0, timeout=30) as client:
        yield client
    live.wait_until_free()
