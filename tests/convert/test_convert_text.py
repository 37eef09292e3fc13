from pathlib import Path

import pytest
import torch
from sources import write_source

from latentkv.convert import text
from latentkv.convert.text import load_writer, tokens_of_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source("llama", tmp_path_factory.mktemp("source"))


def test_many_sequences_are_written_in_as_many_steps_as_one(folder: Path, monkeypatch: pytest.MonkeyPatch):
    writer, steps = load_writer(folder, 40), 0
    step = writer.engine.step

    def counted() -> object:
        nonlocal steps
        steps += 1
        return step()

    monkeypatch.setattr(writer.engine, "step", counted)
    tokens = tokens_of_model(writer, sequences=text.TOGETHER, length=40)
    assert tokens.shape == (64, 40)
    assert len(tokens.unique(dim=0)) == 64
    assert 39 <= steps <= 42


def test_what_a_source_writes_does_not_depend_on_how_many_sequences_are_written_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    together = tokens_of_model(load_writer(folder, 40), sequences=8, length=40, seed=5)
    monkeypatch.setattr(text, "TOGETHER", 1)
    assert torch.equal(together, tokens_of_model(load_writer(folder, 40), sequences=8, length=40, seed=5))
