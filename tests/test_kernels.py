"""The C++ extension in a program of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from latentkv import kernels

HOLDS = """
from threading import Event, Thread
from latentkv import kernels

held = Event()

def hold():
    kept = kernels.extension.Recording()
    held.set()
    Event().wait()

Thread(target=hold, daemon=True).start()
held.wait()
"""


@pytest.mark.skipif(kernels.extension is None, reason="the native kernels are not built")
def test_a_program_that_ends_while_a_thread_holds_recorded_steps_is_told_nothing_of_it() -> None:
    ended = subprocess.run([sys.executable, "-c", HOLDS], capture_output=True, text=True, check=True)
    assert ended.stderr == ""
