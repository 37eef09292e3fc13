"""When Triton's kernels compute, and how that is said."""

from __future__ import annotations

import pytest
import torch
from ops_cases import mla_case

from latentkv import kernels
from latentkv.errors import ConfigError
from latentkv.kernels import use_backend
from latentkv.ops import describe_backends, mla_attend
from latentkv.ops.triton import eligible
from latentkv.ops.triton.eligible import takes, why_not_triton
from latentkv.ops.triton.launch import Launch

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there was a GPU with all that is needed."""
    monkeypatch.setattr(eligible, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    eligible._why_not_on_gpu.cache_clear()


@pytest.fixture(autouse=True)
def forgotten() -> object:
    yield
    eligible._why_not_on_gpu.cache_clear()


def test_a_cpu_is_left_to_other_kernels_unless_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launch, "run", lambda self: pytest.fail("Triton was not named"))
    case = mla_case([1], [9], heads=2)
    mla_attend(*case.args, latent_dim=64, scale=0.1)
    assert "LATENTKV_ISA=triton" in (why_not_triton(CPU) or "")


def test_on_a_cpu_it_has_to_be_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    with use_backend("triton"):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert why_not_triton(CPU) is None
        monkeypatch.delenv("TRITON_INTERPRET")
        assert "set TRITON_INTERPRET=1" in (why_not_triton(CPU) or "")


def test_triton_cannot_be_named_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    with (
        pytest.raises(ConfigError, match="backend='triton' does not run here; choose one of torch"),
        use_backend("triton"),
    ):
        pass


@pytest.mark.usefixtures("ampere")
def test_a_gpu_computes_with_triton_unless_torch_is_named() -> None:
    assert why_not_triton(GPU) is None
    with use_backend("torch"):
        assert why_not_triton(GPU) == "are switched off: unset LATENTKV_ISA"


@pytest.mark.usefixtures("ampere")
def test_a_gpu_without_triton_or_older_than_ampere_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert why_not_triton(GPU) == "need compute capability 8.0, not this GPU's 7.5"
    eligible._why_not_on_gpu.cache_clear()
    monkeypatch.setattr(eligible, "has_triton", lambda: False)
    assert "pip install 'latentkv[gpu]'" in (why_not_triton(GPU) or "")


@pytest.mark.usefixtures("ampere")
def test_every_op_says_what_computes_it_on_a_gpu() -> None:
    by_op = describe_backends(GPU, torch.bfloat16)
    for op in ("mla_attend", "gqa_attend", "mla_prefill", "moe_experts", "norm_rope_write", "merge_states", "rms_norm"):
        assert by_op[op].startswith("Triton")
    assert "Triton" not in describe_backends(GPU, torch.float64)["mla_attend"]
    with use_backend("torch"):
        assert "Triton" not in describe_backends(GPU, torch.bfloat16)["mla_attend"]


@pytest.mark.usefixtures("ampere")
def test_torch_computes_gradients_and_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.zeros(2)
    with use_backend("triton"):
        assert takes(x, x.bfloat16())
        assert not takes(x, x.double())
        assert not takes(x, x.clone().requires_grad_())
        with torch.no_grad():
            assert takes(x, x.clone().requires_grad_())
