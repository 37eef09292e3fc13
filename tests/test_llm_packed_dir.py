"""`LLM(packed_dir=...)`: the same tokens from mapped weights, shared memory, and starts that nothing can spoil."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from forked_program import RETURN_WHAT_IS_FREED, ForkedProgram
from latentkv import LLM, kernels
from latentkv.engine.memory import beside_weights
from latentkv.errors import CacheError, ConfigError
from latentkv.llm_options import PACKED_DIR_VARIABLE, default_packed_dir
from stored_models import GREEDY, MLA, PROMPT, write_model

pytestmark = pytest.mark.skipif(kernels.extension is None, reason="the native kernels are not built")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "mla", MLA)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_the_tokens_are_the_same_with_and_without(model: Path, tmp_path: Path) -> None:
    expected = LLM(model, dtype="bf16", packed_dir=None).generate(PROMPT, GREEDY)[0].token_ids
    for _ in range(2):
        llm = LLM(model, dtype="bf16", packed_dir=tmp_path / "packed")
        assert llm.packed_file is not None
        assert llm.generate(PROMPT, GREEDY)[0].token_ids == expected
    assert len(files(tmp_path / "packed")) == 1


def test_the_longest_context_needs_no_file_of_its_own(model: Path, tmp_path: Path) -> None:
    for context in (64, 128, None):
        LLM(model, dtype="bf16", packed_dir=tmp_path / "packed", max_context=context)
    assert len(files(tmp_path / "packed")) == 1


def test_nothing_is_kept_where_nothing_is_packed(model: Path, tmp_path: Path) -> None:
    assert LLM(model, packed_dir=tmp_path / "packed", dtype="fp32").packed_file is None
    assert LLM(model, dtype="bf16", packed_dir=None).packed_file is None
    assert files(tmp_path / "packed") == []


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(PACKED_DIR_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_packed_dir() == tmp_path / ".cache/latentkv/packed"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification has ignored
    assert default_packed_dir() == tmp_path / ".cache/latentkv/packed"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_packed_dir() == tmp_path / "xdg/latentkv/packed"
    monkeypatch.setenv(PACKED_DIR_VARIABLE, str(tmp_path / "named"))
    assert default_packed_dir() == tmp_path / "named"
    monkeypatch.setenv(PACKED_DIR_VARIABLE, "")
    assert default_packed_dir() is None


def test_the_default_folder_is_used(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(PACKED_DIR_VARIABLE, str(tmp_path / "named"))
    assert LLM(model, dtype="bf16").packed_file is not None
    assert len(files(tmp_path / "named")) == 1


def make_open(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def make_file(path: Path) -> None:
    path.write_text("no folder")


@pytest.mark.parametrize("spoil", [make_open, make_file])
def test_a_folder_that_cannot_be_used(
    spoil: Callable[[Path], None],
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One warning where it is the default, an error where it was asked for."""
    spoil(tmp_path / "spoilt")
    monkeypatch.setenv(PACKED_DIR_VARIABLE, str(tmp_path / "spoilt"))
    with caplog.at_level(logging.WARNING):
        assert LLM(model, dtype="bf16").packed_file is None
    assert len(caplog.records) == 1
    with pytest.raises(CacheError, match=r"packed_dir=.*spoilt"):
        LLM(model, dtype="bf16", packed_dir=tmp_path / "spoilt")


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "1GiB"])
def test_a_size_that_is_none_is_refused(size: object, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="packed_dir_bytes"):
        LLM(model, packed_dir=tmp_path, packed_dir_bytes=size)  # type: ignore[arg-type]


def test_weights_larger_than_the_memory_leave_an_eighth_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    assert beside_weights(10 << 30, 4 << 30, Path("m")) == 6 << 30
    assert not caplog.records
    assert beside_weights(8 << 30, 11 << 30, Path("m")) == 1 << 30
    assert "The weights of m take 11.0 GiB, 3.0 GiB more than the memory that is free" in caplog.text


# Prints how much memory that is no file's a process has once it has loaded a model, and what it shares of the file.
MEASURE = """
import json, re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from latentkv import LLM
def sizes(text, *keys):
    return {key: int(re.search(rf"^{key}:\\s+(\\d+) kB", text, re.M)[1]) << 10 for key in keys}
llm = LLM(sys.argv[1], dtype="bf16", packed_dir=sys.argv[2] or None, kv_cache_bytes=1 << 20, max_context=64)
found = {"own": sum(sizes(Path("/proc/self/status").read_text(), "RssAnon", "RssShmem").values())}
llm.logits(list(range(5, 25)))
print(json.dumps(found), flush=True)
sys.stdin.readline()
if llm.packed_file:
    found["bytes"] = llm.packed_file.nbytes
    rows = Path("/proc/self/smaps").read_text().split("\\n")
    at = next(i for i, row in enumerate(rows) if row.endswith(".packed"))
    found |= sizes("\\n".join(rows[at : at + 25]), "Rss", "Pss", "Anonymous")
found["compiler"] = "torch._dynamo" in sys.modules or "sympy" in sys.modules
print(json.dumps(found), flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what processes share")
def test_a_start_holds_no_weights_of_its_own_and_two_processes_share_their_pages(tmp_path: Path) -> None:
    """Also the first start, which packs them: they go to the file layer by layer."""
    shape = MLA | {"hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 12}
    model = write_model(tmp_path / "model", shape | {"first_k_dense_replace": 12, "vocab_size": 256})
    with ExitStack() as stack:
        processes: list[ForkedProgram] = []
        for folder in ("", tmp_path / "packed", tmp_path / "packed"):
            process = stack.enter_context(ForkedProgram(RETURN_WHAT_IS_FREED + MEASURE, model, folder))
            processes.append(process)
            answer(process)  # it has loaded the model, and run it
        anew, first, second = (json.loads(answer(process, "measure")) for process in processes)
    assert first["bytes"] > 50 << 20
    for found in (first, second):
        assert anew["own"] - found["own"] > 0.9 * found["bytes"]
        assert found["Rss"] > found["bytes"] / 2
        assert found["Pss"] < 0.6 * found["Rss"]
        assert found["Anonymous"] == 0
        assert not found["compiler"]
    # From those two, which are copies of one process, this one differs in the seed of hash(), too.
    assert LLM(model, dtype="bf16", packed_dir=tmp_path / "packed", max_context=64).packed_file is not None
    assert len(files(tmp_path / "packed")) == 1


def answer(process: ForkedProgram, word: str = "") -> str:
    if word:
        process.stdin.write(word + "\n")
        process.stdin.flush()
    return process.stdout.readline()
