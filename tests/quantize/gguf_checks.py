"""Checkpoints that GGUF files are written of, and what the files are held to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from quantize_models import random_decoder
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from latentkv.models.loading import load_model, save_pretrained
from latentkv.text.decoders import BYTE_CHARACTERS

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
V2 = {"model_type": "deepseek_v2", "topk_method": "greedy", "routed_scaling_factor": 1.5}
GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "n_routed_experts": None}


def save(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """A random checkpoint whose numbers stay small enough to compare what comes of them."""
    decoder = random_decoder(**changes)
    for name, tensor in decoder.state_dict().items():
        tensor.mul_(0.5)
        if "norm" in name:
            tensor.add_(1)
    save_pretrained(decoder, folder, dtype=dtype)
    return folder


def logits(path: Path, length: int = 40) -> Tensor:
    """Of the first tokens, in float32 on unpacked weights."""
    decoder = load_model(path, dtype=torch.float32)
    with torch.inference_mode():
        return decoder.logits(decoder.forward_train(torch.arange(3, 3 + length)[None]))[0]


def add_tokenizer(
    folder: Path, steps: list[Any], merges: tuple[tuple[str, str], ...] = (), *, nfc: bool = False, whole: bool = False
) -> Path:
    """A byte-level tokenizer.json: `<s>`, `</s>`, 256 bytes, what the merges make, and an added token."""
    tokens = ["<s>", "</s>", *BYTE_CHARACTERS.values(), *("".join(pair) for pair in merges)]
    vocab = {token: number for number, token in enumerate(tokens)}
    library = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), ignore_merges=whole))
    library.pre_tokenizer = pre_tokenizers.Sequence(steps)
    library.decoder = decoders.ByteLevel()
    if nfc:
        library.normalizer = normalizers.NFC()
    library.add_special_tokens(["<s>", "</s>"])
    library.add_tokens(["<tool>"])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": "<s>",
                "eos_token": "</s>",
                "add_bos_token": True,
                "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}</s>{% endfor %}",
            }
        )
    )
    return folder


def copied_tokenizer(source: Path, folder: Path) -> Path:
    for path in source.glob("tokenizer*"):
        shutil.copy(path, folder / path.name)
    return folder
