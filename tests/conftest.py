"""Settings of every test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch

if TYPE_CHECKING:
    from latentkv import LLM
    from live_server import Live

# Without a GPU, Triton's kernels are tested through its interpreter, which has to be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# One thread: small products do not wait for each other, and results do not vary.
torch.set_num_threads(1)

# The same examples every time, however long they take: a run that fails can be run again.
hypothesis.settings.register_profile("latentkv", derandomize=True, deadline=None)
hypothesis.settings.load_profile("latentkv")

# A shell that runs the tests in the background has them ignore Ctrl-C, and so would the programs that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


# The server's tests and those of its faults; imported here when they ask, for all others need no server.


@pytest.fixture(scope="session")
def reference() -> LLM:
    """The served model once more, to ask directly."""
    from latentkv import LLM

    return LLM(dtype="fp32", kv_cache_bytes=16 << 20)


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """A server with the embedded model, for all tests that leave it as it was."""
    from latentkv import LLM
    from live_server import serving

    with serving(LLM(dtype="fp32", kv_cache_bytes=16 << 20, step_seconds=0.25)) as server:
        yield server
