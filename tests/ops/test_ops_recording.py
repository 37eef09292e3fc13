"""Recorded native calls: run again they compute the same on new numbers; nothing else is recorded."""

from __future__ import annotations

import pytest
import torch

from latentkv.errors import OpError
from latentkv.ops import linear, rms_norm, write_latents
from latentkv.ops.native.recording import NotRecordableError, Recording, kernel_seconds
from latentkv.weights import pack_weight


@pytest.fixture(autouse=True)
def native(backend: str) -> None:
    if backend == "torch":
        pytest.skip("there are native calls to record only where the kernels run")


@torch.inference_mode()
def test_recorded_calls_compute_on_what_lies_in_their_memory_now() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 64, generator=generator).bfloat16() for _ in range(2))
    weight, norm = pack_weight(torch.randn(40, 64, generator=generator)), torch.ones(64).bfloat16()
    memory, recording = x.clone(), Recording()
    with recording.record():
        out = linear(rms_norm(memory, norm, 1e-6)[1:], weight)
    assert torch.equal(out, linear(rms_norm(x, norm, 1e-6)[1:], weight))
    memory.copy_(y)
    junk = [torch.randn(3, 64) for _ in range(50)]  # what was allocated meanwhile is not given to others
    recording.run()
    assert torch.equal(out, linear(rms_norm(y, norm, 1e-6)[1:], weight))
    assert len(junk) == 50


@pytest.mark.parametrize("name", ["add", "copy", "contiguous", "item", "tensor"])
@torch.inference_mode()
def test_what_torch_computes_is_refused(name: str) -> None:
    x = torch.randn(4, 6)
    with pytest.raises(NotRecordableError, match="is computed by torch"), Recording().record():
        if name == "add":
            x + 1
        elif name == "copy":
            x[:, 1:].zero_()
        elif name == "contiguous":
            x.T.contiguous()
        elif name == "tensor":
            torch.tensor([1.0, 2.0])
        else:
            x[0, 0].item()
    assert torch.equal(x + 1, 1 + x)  # and nothing of it lasts


@torch.inference_mode()
def test_calls_after_the_block_are_not_recorded() -> None:
    x, norm, recording = torch.ones(1, 8), torch.ones(8), Recording()
    with recording.record():
        rms_norm(x, norm, 1e-6)
    rms_norm(x, norm, 1e-6)
    assert len(recording._calls) == 1  # pyright: ignore[reportPrivateUsage]


@torch.inference_mode()
def test_a_call_that_can_no_longer_be_made_says_so() -> None:
    pages, slots, latents = torch.zeros(1, 4, 24), torch.tensor([2]), torch.ones(1, 16)
    recording = Recording()
    with recording.record():
        write_latents(pages, slots, latents, latents[:, :8])
    slots.fill_(9)
    with pytest.raises(OpError, match="recorded call 0 of 1 names a slot"):
        recording.run()


def test_time_in_kernels_only_grows() -> None:
    before = kernel_seconds()
    rms_norm(torch.ones(100, 4096), torch.ones(4096), 1e-6)
    assert kernel_seconds() > before
