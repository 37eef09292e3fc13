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

EXPERTS = """
import resource

import torch

from latentkv.ops import moe_experts
from latentkv.weights.formats import CODE_FORMATS
from latentkv.weights.layout import pack_weight
from latentkv.weights.rounding import round_plainly

dim, inner, tokens = 1024, 512, 12000
weights = [torch.randn(4, 2 * inner, dim), torch.randn(4, dim, inner)]
packed = [pack_weight(round_plainly(weight, CODE_FORMATS["uint2"], 16, torch.float16)) for weight in weights]
x, ids, scales = torch.randn(tokens, dim).bfloat16(), torch.randint(0, 4, (tokens, 4)), torch.rand(tokens, 4)
moe_experts(x[:8], ids[:8], scales[:8], *packed)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
moe_experts(x, ids, scales, *packed)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - 2 * x.numel())
"""


@pytest.mark.skipif(kernels.extension is None, reason="the native kernels are not built")
def test_a_program_that_ends_while_a_thread_holds_recorded_steps_is_told_nothing_of_it() -> None:
    ended = subprocess.run([sys.executable, "-c", HOLDS], capture_output=True, text=True, check=True)
    assert ended.stderr == ""


@pytest.mark.slow
@pytest.mark.skipif(kernels.extension is None, reason="the native kernels are not built")
def test_what_experts_need_for_many_tokens_at_a_time_is_bounded_also_in_groups_of_16() -> None:
    grown = int(subprocess.run([sys.executable, "-c", EXPERTS], capture_output=True, text=True, check=True).stdout)
    assert grown <= 1.25 * 2**27  # BYTES_AT_A_TIME of bindings_moe.cpp, and what scratch memory takes besides
