"""llama.cpp runs the GGUF files that are written here, and predicts what LatentKV does.

It runs in an interpreter of its own, which LATENTKV_LLAMA_CPP_PYTHON names: a virtual environment with
`pip install xllamacpp`.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_checks import V2, YARN, copied_tokenizer, save

from latentkv.llm_options import EMBEDDED_MODEL
from latentkv.models.loading import load_model
from latentkv.quantize.gguf import plan_gguf, write_gguf
from latentkv.text import load_tokenizer

PYTHON = os.environ.get("LATENTKV_LLAMA_CPP_PYTHON")
DATA = Path(os.environ.get("LATENTKV_DATA", Path(__file__).parents[2] / "../shared/data"))
STORIES = DATA / "stories260K"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="LATENTKV_LLAMA_CPP_PYTHON names no interpreter that has xllamacpp"),
    pytest.mark.skipif(not STORIES.is_dir(), reason=f"no stories260K in {DATA} (set LATENTKV_DATA)"),
]

TEXTS = ["It was a dark night; the coachman’s 'naïve' words.\n\n  Two spaces, then 中文 🐋", " a", "It's 3.14"]
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine. One day, she saw "
    "a big dog near the park. The dog was very happy and wagged its tail. Lily said, 'Hello, dog! Will you play?' "
) * 2


def ask(file: Path, texts: list[str], prompts: list[list[int]]) -> dict[str, Any]:
    asked = file.with_suffix(".json")
    asked.write_text(json.dumps({"model": str(file), "texts": texts, "prompts": prompts}))
    script = Path(__file__).with_name("llama_cpp_answers.py")
    ran = subprocess.run([str(PYTHON), script, asked], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


def compare(file: Path, ids: list[int], texts: list[str] = TEXTS) -> tuple[float, float]:
    """(share of positions with the same likeliest token, largest difference of the likeliest's log-probability)."""
    prompts = [ids[:length] for length in range(8, len(ids))]
    theirs = ask(file, texts, prompts)
    tokenizer, decoder = load_tokenizer(file), load_model(file, dtype=torch.float32)
    assert theirs["tokens"] == [tokenizer.encode(text, allow_special=True) for text in texts]
    with torch.inference_mode():
        ours = decoder.logits(decoder.forward_train(torch.tensor([ids])))[0].log_softmax(-1)
    said = [(ours[len(prompt) - 1], top) for prompt, top in zip(prompts, theirs["next"], strict=True) if top]
    assert len(said) > 0.6 * len(prompts)
    same = sum(int(row.argmax()) == top[0][0] for row, top in said)
    return same / len(said), max(abs(float(row[top[0][0]]) - top[0][1]) for row, top in said)


# llama.cpp rounds activations to 8 bits beside quantised weights, so that two that are nearly as likely change places.
LEAST = {"f32": 1.0, "bf16": 0.98, "q8_0": 0.97, "q6_k": 0.97, "q4_k": 0.97, "q4_0": 0.97, "mxfp4": 0.97}


@pytest.mark.parametrize("asked", LEAST)
@pytest.mark.parametrize("source", [EMBEDDED_MODEL, STORIES], ids=["deepseek2", "llama"])
def test_every_type_of_a_trained_model_is_run_alike(source: Path, asked: str, tmp_path: Path) -> None:
    plan = plan_gguf(source, asked, "qwen2" if source == EMBEDDED_MODEL else None)
    write_gguf(plan, tmp_path / "model.gguf")
    same, far = compare(tmp_path / "model.gguf", load_tokenizer(tmp_path / "model.gguf").encode(STORY)[:300])
    assert same >= LEAST[asked], (same, far)


MODELS: dict[str, dict[str, Any]] = {
    "v3": {},
    "v2-lite": V2 | {"q_lora_rank": None, "rope_parameters": YARN},
    "v2-lite-27": V2 | {"q_lora_rank": None, "rope_parameters": YARN, "num_hidden_layers": 27},
    "v3-groups": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "q_lora_rank": None},
    "youtu": {"model_type": "youtu", "n_routed_experts": None},
}


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_router_and_query_is_run_alike(name: str, tmp_path: Path) -> None:
    folder = copied_tokenizer(STORIES, save(tmp_path / "source", torch.float32, vocab_size=512, **MODELS[name]))
    write_gguf(plan_gguf(folder, "f32"), tmp_path / "model.gguf")
    same, far = compare(tmp_path / "model.gguf", torch.randint(300, (40,)).add(3).tolist(), texts=[])
    assert same == 1.0 and far < 0.05
