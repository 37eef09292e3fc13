"""A GQA model made into an MLA model: what it caches, and how often both expect the same token.

Run it: python examples/convert_gqa.py [MODEL] [--kv-budget 1/2]    (a folder of a Llama, Mistral, Qwen2 or Qwen3)
Without MODEL a small random Llama is made, which shows the steps; what is lost of it says nothing of real models.
"""

import argparse
import shutil
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from latentkv import LLM
from latentkv.convert import ConvertOptions, convert_checkpoint
from latentkv.convert.text import tokens_of_file
from latentkv.llm_options import EMBEDDED_MODEL
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.loading import save_pretrained

TEXT = EMBEDDED_MODEL / "README.md"  # a text that is at hand; conversions that count take one of the model's own kind


def main() -> None:
    """Convert in a temporary folder, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--kv-budget", type=Fraction, default=Fraction(1, 2), help="share of the cache to keep")
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        source = given.model or random_llama(Path(folder) / "llama")
        target = Path(folder) / "llama-mla"
        calibration = tokens_of_file(source, TEXT, sequences=8, length=128)
        report = convert_checkpoint(source, target, calibration, ConvertOptions(kv_budget=float(given.kv_budget)))
        before, after = (LLM(path, dtype="fp32", kv_cache_bytes=64 << 20, packed_dir=None) for path in (source, target))
        print(f"rank {report.rank} and {report.rope_dim} dimensions with RoPE")
        print(f"cache: {before.cache.bytes_per_token} bytes per token before, {after.cache.bytes_per_token} after")
        text = TEXT.read_text(encoding="utf-8")
        same = after.predict(text).agreement(before.predict(text))
        print(f"the likeliest token is the same for {same:.1%}; `latentkv heal` wins quality back")


def random_llama(folder: Path) -> Path:
    """Write a Llama of 2 layers, 8 query and 4 key/value heads, with the tokenizer of the model in the package."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "vocab_size": 4096,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    decoder = Decoder(read_config(config))
    for weights in decoder.parameters():
        if weights.dim() == 2:
            torch.nn.init.normal_(weights, std=0.15)
    save_pretrained(decoder, folder)
    for file in EMBEDDED_MODEL.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


if __name__ == "__main__":
    main()
