"""The examples run as they are printed, and MLA in 100 lines gives the library's numbers."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latentkv import LLM
from live_server import NAME, serving

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_mla_in_100_lines_gives_the_librarys_numbers() -> None:
    expected, found = runpy.run_path(str(EXAMPLES / "mla_in_100_lines.py"))["outputs_of_both"]()
    assert expected.shape == (203, 256)
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()


def test_its_two_forms_are_one_function() -> None:
    plain_mla = runpy.run_path(str(EXAMPLES / "mla_in_100_lines.py"))["PlainMLA"]
    torch.manual_seed(1)
    absorbed = plain_mla(40, 3, L=32, Dn=12, R=8, Dv=10).double()
    expanded = plain_mla(40, 3, L=32, Dn=12, R=8, Dv=10).double()
    expanded.load_state_dict(absorbed.state_dict())
    x = torch.randn(17, 40, dtype=torch.float64)
    with torch.inference_mode():
        assert (absorbed.decode(x) - expanded.prefill(x)).abs().max() <= 1e-12
    assert absorbed.cache.shape == (17, 32 + 8)


def test_its_mla_takes_no_more_than_100_lines() -> None:
    lines = (EXAMPLES / "mla_in_100_lines.py").read_text(encoding="utf-8").splitlines()
    assert next(i for i, line in enumerate(lines) if "The 100 lines end here" in line) <= 100


def test_generate_prints_texts_a_stream_and_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("generate.py", monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert set(json.loads(lines[lines.index("# JSON that the schema validates") + 1])) == {"name", "age"}
    assert lines[-1] == "# The cache took 768 bytes per token"


def test_convert_gqa_halves_the_cache_of_a_random_llama(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("convert_gqa.py", monkeypatch)
    assert "cache: 1024 bytes per token before, 512 after" in capsys.readouterr().out


def test_chat_client_prints_a_served_models_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai", reason="the openai package is not installed")
    with serving(LLM(kv_cache_bytes=16 << 20)) as live:
        run("chat_client.py", monkeypatch, "Who is there?", f"{live.url}/v1")
    printed = capsys.readouterr().out
    assert printed.startswith(f"{NAME}: ")
    assert printed.endswith(" tokens read, 60 written)\n")


def test_every_example_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert len(names) == 5
    assert all(f"[{name}]({name})" in listed for name in names)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom_in_a_plain_interpreter(tmp_path: Path) -> None:
    cells = json.loads((EXAMPLES / "convert.ipynb").read_text(encoding="utf-8"))["cells"]
    program = tmp_path / "convert.py"
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    program.write_text("\n\n".join(code), encoding="utf-8")
    done = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bytes per token: 1024 -> 128" in done.stdout
