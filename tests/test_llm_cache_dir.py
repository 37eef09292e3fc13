"""`LLM(cache_dir=...)`: what one process has read another need not, and says the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from forked_program import run_forked
from latentkv import LLM
from latentkv.errors import CacheError
from latentkv.options import CacheOptions
from stored_models import GQA, GREEDY, MLA, PROMPT, write_model

FORMATS = {"mla": ("fp32", "bf16", "fp16", "int8", "fp8"), "gqa": ("fp32", "bf16", "fp16")}

# Prints, for each model and format, the tokens and how many of the prompt's tokens came from the folder; and whether
# torch's compiler was loaded, which takes seconds and serves nobody here.
PROGRAM = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from latentkv import LLM
from stored_models import GREEDY, PROMPT
models, folder, formats = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
result = {}
for kind, names in formats.items():
    for name in names:
        llm = LLM(models / kind, kv_dtype=name, cache_dir=folder)
        said = llm.generate(PROMPT, GREEDY)[0].token_ids
        result[f"{kind} {name}"] = [said, llm.engine.counters.store_hits]
        llm.close()
result["compiler"] = "torch._dynamo" in sys.modules
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for kind, config in (("mla", MLA), ("gqa", GQA)):
        write_model(root / kind, config)
    return root


def in_a_fresh_process(models: Path, folder: Path) -> dict[str, list]:
    code, found, said = run_forked(PROGRAM, models, folder, json.dumps(FORMATS))
    assert code == 0, said
    return json.loads(found)


def test_a_fresh_process_says_the_same_in_every_format_without_reading_the_prompt_again(models: Path, tmp_path: Path):
    first, second = (in_a_fresh_process(models, tmp_path) for _ in range(2))
    for kind, names in FORMATS.items():
        for name in names:
            plain = LLM(models / kind, kv_dtype=name).generate(PROMPT, GREEDY)[0].token_ids
            assert first[f"{kind} {name}"] == [plain, 0]
            assert second[f"{kind} {name}"] == [plain, 256]
            # From those two, which are copies of one process, this one differs in the seed of hash(), too.
            here = LLM(models / kind, kv_dtype=name, cache_dir=tmp_path)
            assert here.generate(PROMPT, GREEDY)[0].token_ids == plain
            assert here.engine.counters.store_hits == 256
            here.close()
    assert first["compiler"] is second["compiler"] is False


def hits(folder: Path, model: Path, **options) -> int:
    """Prompt tokens that come from the folder; the prompt is stored afterwards."""
    llm = LLM(model, cache_dir=folder, **options)
    llm.generate(PROMPT, GREEDY)
    llm.close()
    return llm.engine.counters.store_hits


@pytest.mark.parametrize("change", [{"weights": "int8"}, {"dtype": "bf16"}, {"dtype": "bf16", "kv_dtype": "fp32"}])
def test_another_precision_is_another_model(models: Path, tmp_path: Path, change: dict):
    assert hits(tmp_path, models / "mla") == 0
    assert hits(tmp_path, models / "mla", **change) == 0
    assert hits(tmp_path, models / "mla", **change) == 256
    assert hits(tmp_path, models / "mla") == 256


def test_a_fine_tune_that_differs_in_one_number_is_another_model(models: Path, tmp_path: Path):
    tuned = write_model(tmp_path / "tuned", MLA)
    assert hits(tmp_path / "store", models / "mla") == 0
    assert hits(tmp_path / "store", tuned) == 256  # not yet tuned: a copy is the same model
    path = tuned / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][60, 31] += 1
    save_file(tensors, path)
    assert hits(tmp_path / "store", tuned) == 0
    assert hits(tmp_path / "store", models / "mla") == 256


def test_a_shorter_context_of_the_same_model_is_the_same_model(models: Path, tmp_path: Path):
    assert hits(tmp_path, models / "mla") == 0
    assert hits(tmp_path, models / "mla", max_context=512) == 256


def test_what_the_folder_holds_is_known_and_its_size_is_what_was_asked(models: Path, tmp_path: Path):
    assert hits(tmp_path, models / "mla") == 0
    sizes = [path.stat().st_size for path in tmp_path.glob("*.page")]
    llm = LLM(models / "mla", cache_dir=str(tmp_path), cache_dir_bytes=3 * sizes[0])
    assert llm.store is not None
    assert (len(sizes), llm.store.num_pages) == (4, 2)  # in whole blocks, three are a little too many
    assert llm.store.total_bytes <= llm.store.max_bytes == 3 * sizes[0]
    assert LLM(models / "mla").store is None
    assert CacheOptions().cache_dir_bytes == 10 * 2**30
    llm.close()


def test_a_folder_or_a_size_that_cannot_be_used_is_refused_by_name(models: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cache_dir=.*file' cannot be used"):
        LLM(models / "mla", cache_dir=tmp_path / "file")
    with pytest.raises(CacheError, match="cache_dir_bytes=100 holds no page"):
        LLM(models / "mla", cache_dir=tmp_path / "store", cache_dir_bytes=100)
