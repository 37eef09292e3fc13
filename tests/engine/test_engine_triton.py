"""Whole models on Triton's kernels: through its interpreter, or on a GPU where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine_models import cache_for, tiny_decoder
from latentkv import LLM, SamplingParams
from latentkv.engine.runner import Runner
from latentkv.kernels import Backend, has_triton, use_backend
from latentkv.models.transfer import to_device, to_host
from latentkv.ops.triton.launch import Launch
from triton_interpreter import patch_language_once

COMMON = {"rms_norm_kernel", "rope_kernel", "attend_kernel", "merge_chunks_kernel"}
KERNELS = {"mla": COMMON | {"write_kernel", "prefill_kernel", "gate_up_kernel", "down_kernel"}, "gqa": COMMON}

needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed: pip install 'latentkv[gpu]'")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def hidden_states(kind: str, backend: Backend) -> torch.Tensor:
    """Of two prompts, one of them read in two steps, and of two tokens decoded after each."""
    decoder = tiny_decoder(kind)
    runner = Runner(decoder, cache_for(decoder, 20))
    tokens = [[1, *range(5, 16)], [1, 9, 33, 7, 20]]
    with use_backend(backend), runner.sequences(tokens) as sequences:
        parts = [runner.read(sequences, [7, 3]), runner.read(sequences[:1], [3])]
        parts += [runner.read(sequences, [1, 1]), runner.read(sequences, [1, 1])]
    return torch.cat(parts)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU here, Triton does not interpret")
@pytest.mark.parametrize("kind", ["mla", pytest.param("gqa", marks=pytest.mark.slow)])
def test_a_model_reads_and_decodes_the_same_on_tritons_kernels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_language_once(monkeypatch)
    launched: set[str] = set()
    launch = Launch.run

    def noted(self: Launch) -> None:
        launched.add(self.kernel.__name__)
        launch(self)

    monkeypatch.setattr(Launch, "run", noted)
    expected = hidden_states(kind, "torch")
    assert launched == set()
    with np.errstate(all="ignore"):  # the interpreter computes with numpy
        found = hidden_states(kind, "triton")
    assert launched >= KERNELS[kind]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@needs_triton
@needs_gpu
@pytest.mark.gpu
def test_a_gpu_writes_what_the_cpu_writes() -> None:
    prompts, params = ["The old house", "It was"], SamplingParams(max_tokens=20, temperature=0)
    texts = [
        [c.text for c in LLM(device=device, dtype="fp32", kv_cache_bytes=16 << 20).generate(prompts, params)]
        for device in ("cuda", "cpu")
    ]
    assert texts[0] == texts[1]


def test_nothing_moves_on_a_cpu() -> None:
    values = torch.arange(5)
    assert to_device(values, "cpu") is values
    assert to_host(values) is values


@needs_gpu
@pytest.mark.gpu
def test_tensors_come_back_from_a_gpu_as_they_went() -> None:
    values = torch.arange(5)
    assert torch.equal(to_host(to_device(values, "cuda") * 2), values * 2)
    assert to_host(to_device(values, "cuda")).is_pinned()
