"""What the benchmarks' tests share."""

import socket

import pytest


@pytest.fixture
def unused_url() -> str:
    """An address of this machine where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"
