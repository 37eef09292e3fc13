from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from live_server import Live


@pytest.fixture(scope="session")
def openai_client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture
def client(openai_client: openai.OpenAI, live: Live) -> Iterator[openai.OpenAI]:
    yield openai_client
    live.wait_until_free()
