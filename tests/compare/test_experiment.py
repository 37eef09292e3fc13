"""The order of a comparison, and learning rates that do not work."""

from __future__ import annotations

import json
from hashlib import sha256
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from latentkv.compare import CompareOptions, Sizes, compare_attention
from latentkv.compare.report import choose_rate
from latentkv.errors import RequestError, TrainingError
from latentkv.train.data import find_corpus
from rank_programs import BEGIN, ranks_of

pytestmark = pytest.mark.usefixtures("unpainted")

TINY = Sizes(32, 1, 2, 300)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for animal in ("cat", "dog"):
        lines = [f"The {animal} sat on mat {i % 7} and looked at the {animal}.\n" for i in range(100)]
        (folder / f"{animal}.txt").write_text("".join(lines))
    return folder


def compare(texts: Path, out: Path, rates: tuple[float, ...]):
    options = CompareOptions(
        TINY, ("mha", "mla-8"), seeds=1, steps=6, rates=rates, seq_len=16, batch_tokens=32, eval_bytes=400
    )
    console = Console(file=StringIO())
    return compare_attention(texts, [texts / "dog.txt"], out, options, console, speed=False)


def test_the_rate_is_chosen_when_all_are_known_and_of_those_that_did_not_diverge() -> None:
    assert choose_rate({0.1: 3.0, 0.2: 2.0}, (0.1, 0.2)) == 0.2
    assert choose_rate({0.1: 3.0, 0.2: None}, (0.1, 0.2)) == 0.1
    assert choose_rate({0.1: 3.0}, (0.1, 0.2)) is None
    assert choose_rate({0.1: None, 0.2: None}, (0.1, 0.2)) is None


def test_a_rate_that_diverges_is_not_chosen(texts: Path, tmp_path: Path) -> None:
    report = compare(texts, tmp_path / "out", (1e-3, 1e30))
    assert report is not None
    for arm in report.arms:
        assert (arm.sweep[1e30], arm.rate, arm.rate_at_edge) == (None, 1e-3, True)
        assert arm.losses.keys() == {1}


def test_rates_that_all_diverge_are_said(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="mha diverged with every learning rate"):
        compare(texts, tmp_path / "out", (1e29, 1e30))


def test_a_single_rate_is_taken_without_trying(texts: Path, tmp_path: Path) -> None:
    report = compare(texts, tmp_path / "out", (2e-3,))
    assert report is not None
    assert report.total == report.finished == 2
    assert [(arm.rate, dict(arm.sweep), arm.rate_at_edge) for arm in report.arms] == [(2e-3, {}, False)] * 2


def test_runs_of_an_earlier_version_are_known_by_the_fingerprints_that_they_wrote(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert compare(texts, out, (2e-3,)) is not None
    facts, name = json.loads((out / "options.json").read_text()), "mha_lr0.002_seed1_steps6"
    corpus = find_corpus(texts, eval_files=[texts / "dog.txt"], eval_bytes=400)
    text = [sha256(each.encode()).digest() for each in corpus.training_texts()]
    for path, pieces in corpus.evaluation:
        text += [path.stem.encode(), *(sha256(piece.encode()).digest() for piece in pieces)]
    assert facts["text"] == sha256(b"".join(text)).hexdigest()
    config = json.loads((out / "arms" / "mha.json").read_text())
    options = json.loads((out / "runs" / name / "training.json").read_text())["options"]
    decides = json.dumps([facts, config, options], sort_keys=True).encode()
    assert json.loads((out / "runs" / f"{name}.json").read_text())["fingerprint"] == sha256(decides).hexdigest()


def test_a_damaged_result_is_one_sentence_and_a_result_of_other_text_is_made_anew(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert compare(texts, out, (2e-3,)) is not None
    path = out / "runs" / "mha_lr0.002_seed1_steps6.json"
    whole = json.loads(path.read_text())
    for damage in ("{", "[]", json.dumps(whole | {"loss": "low"})):
        path.write_text(damage)
        with pytest.raises(
            RequestError, match=rf"{path.name} .*: remove it, and the same command trains this run again"
        ):
            compare(texts, out, (2e-3,))
    path.write_text(json.dumps(whole | {"fingerprint": "another"}))
    assert compare(texts, out, (2e-3,)) is not None
    assert json.loads(path.read_text())["fingerprint"] == whole["fingerprint"]


def test_a_folder_with_something_else_is_left_alone(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("mine")
    with pytest.raises(RequestError, match="holds something else"):
        compare(texts, tmp_path / "out", (1e-3,))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["letter.txt"]


_COMPARE = (
    BEGIN
    + """
from io import StringIO
from pathlib import Path
from rank_programs import BEGIN, ranks_of
from rich.console import Console
from latentkv.compare import CompareOptions, Sizes, compare_attention
from latentkv.compare import runs
from latentkv.train.ranks import DataRanks

trained = []
train_model = runs.train_model
runs.train_model = lambda plan, *rest: (trained.append(plan.out.name), train_model(plan, *rest))[1]
ranks = DataRanks.join()
texts = Path(task["texts"])
options = CompareOptions(Sizes(*task["sizes"]), ("mha", "mla-8"), seeds=1, steps=6, rates=(1e-3, 1e30), seq_len=16,
    batch_tokens=32, eval_bytes=400)
report = compare_attention(
    texts, [texts / "dog.txt"], Path(task["out"]), options, Console(file=StringIO()), speed=False, ranks=ranks
)
ranks.leave()
print(json.dumps([trained, [list(arm.losses.values()) for arm in report.arms]]))
"""
)


@pytest.mark.rank
def test_processes_share_the_runs_out_and_find_what_one_does(texts: Path, tmp_path: Path) -> None:
    sizes = [TINY.hidden_size, TINY.num_layers, TINY.num_heads, TINY.vocab_size]
    task = json.dumps({"texts": str(texts), "out": str(tmp_path / "several"), "sizes": sizes})
    with ranks_of(_COMPARE, 2, task) as ranks:
        written = [(rank.stdout.read(), rank.stderr.read()) for rank in ranks]
        assert [rank.wait(60) for rank in ranks] == [0, 0], written
    (first, losses), (second, same) = (json.loads(out) for out, _ in written)
    assert len(first) == len(second) == 3 and not set(first) & set(second)
    alone = compare(texts, tmp_path / "one", (1e-3, 1e30))
    assert alone is not None
    assert losses == same == [list(arm.losses.values()) for arm in alone.arms]
