import shutil
from pathlib import Path

import pytest
import torch
from sources import write_source

from latentkv import LLM
from latentkv.convert import text
from latentkv.convert.text import load_writer, tokens_of_file, tokens_of_model
from latentkv.llm_options import EMBEDDED_MODEL


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


def test_a_file_is_read_with_the_tokenizer_alone(tmp_path: Path):
    folder = tmp_path / "no weights"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED_MODEL / name, folder / name)
    text_file = tmp_path / "text.txt"
    text_file.write_text("It was a dark and stormy night. " * 200, encoding="utf-8")
    tokens = tokens_of_file(folder, text_file, sequences=8, length=32)
    llm = LLM()
    assert tokens.shape == (8, 32)
    assert tokens[0].tolist() == list(llm.request(text_file.read_text(encoding="utf-8")[:400]).prompt_token_ids[:32])
