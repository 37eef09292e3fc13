"""llama.cpp runs the GGUF files that are written here, and predicts what LatentKV does.

It runs in an interpreter of its own, which LATENTKV_LLAMA_CPP_PYTHON names: a virtual environment with
`pip install xllamacpp`. Files of its own making come from its `llama-quantize`, which LATENTKV_LLAMA_QUANTIZE names.
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
from torch import nn
from torch.nn import functional

from latentkv import LLM
from latentkv.checkpoint.tensors import open_tensors
from latentkv.llm_options import EMBEDDED_MODEL
from latentkv.models.layers import Linear
from latentkv.models.loading import load_model
from latentkv.models.moe import Experts
from latentkv.quantize.gguf import plan_gguf, write_gguf
from latentkv.text import load_tokenizer

PYTHON = os.environ.get("LATENTKV_LLAMA_CPP_PYTHON")
QUANTIZE = os.environ.get("LATENTKV_LLAMA_QUANTIZE")
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


def compare(file: Path, ids: list[int], ours: torch.Tensor, texts: list[str] = TEXTS) -> tuple[float, float, float]:
    """How near logits [T, V] of `ids` are to llama.cpp's.

    Returns:
        Share of positions with the same likeliest token; largest and mean difference of its log-probability.
    """
    prompts = [ids[:length] for length in range(8, len(ids))]
    theirs, tokenizer = ask(file, texts, prompts), load_tokenizer(file)
    assert theirs["tokens"] == [tokenizer.encode(text, allow_special=True) for text in texts]
    rows = ours.log_softmax(-1)
    said = [(rows[len(prompt) - 1], top) for prompt, top in zip(prompts, theirs["next"], strict=True) if top]
    assert len(said) > 0.6 * len(prompts)
    same = sum(int(row.argmax()) == top[0][0] for row, top in said)
    far = [abs(float(row[top[0][0]]) - top[0][1]) for row, top in said]
    return same / len(said), max(far), sum(far) / len(far)


def exact_logits(file: Path, ids: list[int]) -> torch.Tensor:
    """In float32, of the weights that the file means."""
    decoder = load_model(file, dtype=torch.float32)
    with torch.inference_mode():
        return decoder.logits(decoder.forward_train(torch.tensor([ids])))[0]


# llama.cpp rounds activations to 8 bits beside quantised weights, so that two that are nearly as likely change places.
LEAST = {"f32": 1.0, "bf16": 0.98, "q8_0": 0.97, "q6_k": 0.97, "q4_k": 0.97, "q4_0": 0.97, "mxfp4": 0.97}


@pytest.mark.parametrize("asked", LEAST)
@pytest.mark.parametrize("source", [EMBEDDED_MODEL, STORIES], ids=["deepseek2", "llama"])
def test_every_type_of_a_trained_model_is_run_alike(source: Path, asked: str, tmp_path: Path) -> None:
    plan = plan_gguf(source, asked, "qwen2" if source == EMBEDDED_MODEL else None)
    write_gguf(plan, tmp_path / "model.gguf")
    ids = load_tokenizer(tmp_path / "model.gguf").encode(STORY)[:300]
    same, far, _ = compare(tmp_path / "model.gguf", ids, exact_logits(tmp_path / "model.gguf", ids))
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
    ids = torch.randint(300, (40,)).add(3).tolist()
    same, far, _ = compare(tmp_path / "model.gguf", ids, exact_logits(tmp_path / "model.gguf", ids), texts=[])
    assert same == 1.0 and far < 0.05


def rounded_as_llama_cpp_does(file: Path, ids: list[int]) -> torch.Tensor:
    """`exact_logits`, but what matrices are given is rounded to 8 bits: beside K and most IQ types in blocks of 256."""
    decoder, stored = load_model(file, dtype=torch.float32), open_tensors(file)

    def rounded(numbers: torch.Tensor, kind: str) -> torch.Tensor:
        if kind.startswith("F"):
            return numbers.half().float()
        block = 256 if "K" in kind or kind in ("IQ4_XS", "IQ3_S") else 32
        blocks = functional.pad(numbers, (0, -numbers.shape[-1] % block)).unflatten(-1, (-1, block))
        scales = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return ((blocks / scales).round() * scales).flatten(-2)[..., : numbers.shape[-1]]

    def watch(module: nn.Module, name: str) -> None:
        kind = stored.shown_dtype(name)
        module.register_forward_pre_hook(lambda _, given: (rounded(given[0], kind), *given[1:]))

    for name, module in decoder.named_modules():
        if isinstance(module, Linear) and f"{name}.weight" in stored:
            watch(module, f"{name}.weight")
        elif isinstance(module, Experts):
            watch(module, f"{name}.0.up_proj.weight")
    with torch.inference_mode():
        hidden = decoder.forward_train(torch.tensor([ids]))
        return decoder.logits(rounded(hidden, stored.shown_dtype("model.embed_tokens.weight")))[0]


@pytest.mark.skipif(not QUANTIZE, reason="LATENTKV_LLAMA_QUANTIZE names no llama-quantize")
@pytest.mark.parametrize("asked", ["Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_XS", "IQ3_S", "Q2_K"])
def test_what_llama_cpp_quantised_is_run_as_llama_cpp_runs_it_but_for_its_rounding(asked: str, tmp_path: Path) -> None:
    whole, file = tmp_path / "whole.gguf", tmp_path / "model.gguf"
    write_gguf(plan_gguf(EMBEDDED_MODEL, "f32", "qwen2"), whole)
    subprocess.run([str(QUANTIZE), whole, file, asked], check=True, capture_output=True, timeout=600)
    book = (DATA / "books" / "dracula.txt").read_text(encoding="utf-8")[40_000:140_000]  # which it has not seen
    ids = load_tokenizer(file).encode(book[:4_000])[:700]
    llm = LLM(file, kv_cache_bytes=32 << 20)  # packed, bf16
    exact, ours = exact_logits(file, ids).log_softmax(-1), llm.logits(ids).log_softmax(-1)
    rounded = rounded_as_llama_cpp_does(file, ids).log_softmax(-1)
    likeliest = exact.argmax(-1, keepdim=True)
    by_bf16, by_rounding = (float((rows - exact).gather(1, likeliest).abs().mean()) for rows in (ours, rounded))
    kept = float((ours.argmax(-1, keepdim=True) == likeliest).float().mean())
    theirs, far, mean = compare(file, ids, exact)
    bits = llm.perplexity(book).bits_per_byte
    print(f"{asked}: {bits:.4f} bits a byte; {kept:.1%} / {theirs:.1%}; {by_bf16:.4f} / {mean:.4f}; {by_rounding:.4f}")
    assert kept >= 0.98 and by_bf16 < 1.2 * by_rounding
    assert theirs >= 0.97 and mean < 1.5 * by_rounding, far
    same, far, mean = compare(file, ids, ours)
    assert same >= 0.96 and mean < 2 * by_rounding, far
