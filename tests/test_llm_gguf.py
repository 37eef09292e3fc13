"""A GGUF file runs as the checkpoint that it was made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader

from command_line import run_here
from gguf_models import write_deepseek2
from latentkv import LLM, SamplingParams
from latentkv.errors import TokenizerError
from latentkv.llm_options import EMBEDDED_MODEL

PROMPTS = ["It was a dark night", "The whale\n\n said: 1234 times", "naïve 🐋"]
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deepseek2(Path(str(EMBEDDED_MODEL)), tmp_path_factory.mktemp("gguf") / "small.gguf")


def test_texts_and_tokens_are_those_of_the_checkpoint(file: Path) -> None:
    published, found = (LLM(model, dtype="fp32", kv_cache_bytes=8 << 20) for model in (None, file))
    assert found.tokenizer is not None and published.tokenizer is not None
    for prompt in PROMPTS:
        assert found.tokenizer.encode(prompt) == published.tokenizer.encode(prompt)
    said = [[(c.text, c.token_ids) for c in llm.generate(PROMPTS, GREEDY)] for llm in (published, found)]
    assert said[0] == said[1]


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0], ids=lambda kind: kind.name)
def test_a_quantised_file_runs_packed_and_keeps_its_prefix_in_a_cache_folder(kind: Type, tmp_path: Path) -> None:
    file = write_deepseek2(
        Path(str(EMBEDDED_MODEL)), tmp_path / "q.gguf", lambda name, shape: Type.BF16 if shape[-1] % 32 else kind
    )
    said: list[str] = []
    for _ in range(2):
        llm = LLM(file, kv_cache_bytes=8 << 20, cache_dir=tmp_path / "cache")
        said.append(llm.generate(PROMPTS[0] * 80, GREEDY)[0].text)
        hits = llm.engine.counters.store_hits
        llm.close()
    assert said[0] == said[1] and hits > 0


def test_every_command_that_takes_a_model_takes_the_file(
    file: Path, latentkv: Callable[..., Any], tmp_path: Path
) -> None:
    generated = latentkv("generate", "-m", file, "-n", 3, "--temperature", 0, "It was")
    assert generated.exit_code == 0, generated.stderr
    looked_at = latentkv("inspect", file)
    assert looked_at.exit_code == 0 and "BF16" in looked_at.stdout and "deepseek_v3" in looked_at.stdout
    planned = latentkv("plan", file, "--context", "1k", "--json")
    assert planned.exit_code == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert plan["weights_dtype"] == "BF16, F32"
    assert plan["weights_bytes"] == sum(tensor.n_bytes for tensor in GGUFReader(file).tensors)
    assert latentkv("plan", file, "--weights-dtype", "int8").exit_code == 0
    copied = latentkv("quantize", file, tmp_path / "int8", "--weights", "int8")
    assert copied.exit_code == 0, copied.stderr
    again = latentkv("generate", "-m", tmp_path / "int8", "-n", 3, "--temperature", 0, "It was")
    assert again.exit_code == 0 and again.stdout == generated.stdout
    refused = latentkv("convert", file, tmp_path / "mla", "--rank", 16, "--rope-dim", 8)
    assert refused.exit_code == 2 and "has latent attention already" in refused.stderr
    assert not (tmp_path / "mla").exists()


@pytest.fixture
def latentkv() -> Callable[..., Any]:
    return run_here


def test_a_file_without_words_serves_token_ids(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gguf_models._add_tokenizer", lambda writer, *_: writer.add_tokenizer_model("no_vocab"))
    llm = LLM(write_deepseek2(Path(str(EMBEDDED_MODEL)), tmp_path / "bare.gguf"), kv_cache_bytes=8 << 20)
    assert llm.tokenizer is None
    assert len(llm.generate([[5, 6, 7]], GREEDY)[0].token_ids) == 12


def test_a_way_to_cut_texts_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    file = write_deepseek2(Path(str(EMBEDDED_MODEL)), tmp_path / "x.gguf")
    file.write_bytes(file.read_bytes().replace(b"gpt-2", b"gpt-9"))
    with pytest.raises(TokenizerError, match="in the way 'gpt-9', which is not known here"):
        LLM(file, kv_cache_bytes=8 << 20)
