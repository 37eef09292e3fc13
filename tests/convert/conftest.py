"""Models that many tests convert or heal, made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from sources import some_tokens, write_source

from latentkv.convert import ConvertOptions, convert_checkpoint


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pairs of folders, for `models` to copy from."""
    return tmp_path_factory.mktemp("originals")


@pytest.fixture(params=["llama", "qwen2"])
def models(request: pytest.FixtureRequest, tmp_path: Path, originals: Path) -> tuple[Path, Path]:
    """(source, converted), a test's own."""
    made = originals / request.param
    if not made.exists():
        write_source(request.param, made / "source")
        convert_checkpoint(made / "source", made / "out", some_tokens(16), ConvertOptions(rank=16, rope_dim=8))
    for name in ("source", "out"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path / "source", tmp_path / "out"
