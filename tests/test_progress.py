import pytest

from latentkv import LLM, SamplingParams
from latentkv.progress import progress_bar


def test_a_bar_counts_completions_and_tokens_on_stderr_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(2) as bar:
        bar.add(3, finished=False)
        bar.add(4, finished=True)
    shown = capsys.readouterr()
    assert "1/2" in shown.err and "7 tokens" in shown.err and shown.out == ""
    with progress_bar(2, shown=False) as bar:
        bar.add(3, finished=True)
    assert capsys.readouterr().err == ""


def test_generate_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM(kv_cache_bytes=4 << 20)
    llm.generate(["The whale", "The sea"], SamplingParams(max_tokens=4, ignore_eos=True), progress=True)
    assert "2/2" in capsys.readouterr().err
