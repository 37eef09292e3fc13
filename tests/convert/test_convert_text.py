import shutil
from pathlib import Path

import pytest
import torch
from sources import write_source

from latentkv import LLM
from latentkv.cli.conversion import text_tokens
from latentkv.convert import text
from latentkv.convert.text import load_writer, tokens_of_file, tokens_of_model
from latentkv.errors import RequestError
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


def test_what_an_interrupted_run_has_written_is_gone_on_with_and_the_text_is_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(text, "TOGETHER", 3)
    whole = tokens_of_model(load_writer(folder, 24), sequences=8, length=24, seed=5)
    kept, told = tmp_path / "text" / "kept.u32", []

    def stopped(done: int, total: int) -> None:
        if done == 5 * 23:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokens_of_model(load_writer(folder, 24), sequences=8, length=24, seed=5, kept=kept, on_token=stopped)
    assert kept.stat().st_size == 3 * 24 * 4, "those that were finished together"
    kept.write_bytes(kept.read_bytes() + b"torn")
    resumed = tokens_of_model(
        load_writer(folder, 24), sequences=8, length=24, seed=5, kept=kept, on_token=lambda *done: told.append(done)
    )
    assert torch.equal(resumed, whole)
    assert told[0] == (3 * 23 + 1, 8 * 23) and told[-1] == (8 * 23, 8 * 23)
    monkeypatch.setattr("latentkv.engine.Engine.step", None)  # nothing is left to be written
    assert torch.equal(tokens_of_model(load_writer(folder, 24), sequences=8, length=24, seed=5, kept=kept), whole)
    assert torch.equal(tokens_of_model(load_writer(folder, 24), sequences=2, length=24, seed=5, kept=kept), whole[:2])


def test_a_file_that_is_too_short_is_refused_or_gives_what_it_has(tmp_path: Path):
    text_file = tmp_path / "text.txt"
    text_file.write_text("It was a dark and stormy night. " * 20, encoding="utf-8")
    with pytest.raises(RequestError, match=r"are needed: give a longer text, or ask for fewer"):
        tokens_of_file(EMBEDDED_MODEL, text_file, sequences=80, length=32)
    given = tokens_of_file(EMBEDDED_MODEL, text_file, sequences=80, length=32, at_most=True)
    assert 1 < len(given) < 80
    assert torch.equal(given, tokens_of_file(EMBEDDED_MODEL, text_file, sequences=len(given), length=32))
    text_file.write_text("It was.", encoding="utf-8")
    with pytest.raises(RequestError, match="are needed: give a longer text"):
        tokens_of_file(EMBEDDED_MODEL, text_file, sequences=80, length=32, at_most=True)


def test_what_was_kept_is_refused_where_it_is_no_text_of_the_model(folder: Path, tmp_path: Path):
    kept = tmp_path / "kept.u32"
    kept.write_bytes(b"\xff" * 4 * 24)
    with pytest.raises(
        RequestError, match=r"kept.u32 is damaged \(the token 4,294,967,295 is not the model's\): remove it"
    ):
        tokens_of_model(load_writer(folder, 24), sequences=1, length=24, kept=kept)


def test_several_texts_give_equal_shares_and_none_is_named_twice(tmp_path: Path):
    files = [tmp_path / name for name in ("a.txt", "b.txt")]
    for file in files:
        file.write_text(f"{file} was a dark and stormy night. " * 100, encoding="utf-8")
    names = [str(file) for file in files]

    def tokens(texts: list[str], sequences: int) -> torch.Tensor:
        return text_tokens(EMBEDDED_MODEL, texts, sequences, 32, seed=0, stage="Text")

    both = tokens(names, 5)
    assert torch.equal(both[:3], tokens(names[:1], 3)) and torch.equal(both[3:], tokens(names[1:], 2))
    with pytest.raises(RequestError, match=r"a.txt is named twice, .*: name each text once"):
        tokens([names[0], names[1], names[0]], 6)
    with pytest.raises(RequestError, match="2 texts need as many --sequences, and 1 are asked for"):
        tokens(names, 1)
