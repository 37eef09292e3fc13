"""How long transformers takes for a token at some depth, as it is and accelerated: `python step.py [--depth 8192]`.

Four layers with the attention of DeepSeek-V2-Lite and narrow feed-forward blocks, random weights, one sequence; both
ways in turn on one cache, the median of some rounds.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DynamicCache

from latentkv.transformers import accelerate, restore


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    asked = parser.parse_args()
    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=1024,
        hidden_size=2048,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        first_k_dense_replace=4,
        max_position_embeddings=asked.depth + 64,
    )
    model = DeepseekV2ForCausalLM(config).to(getattr(torch, asked.dtype)).eval()
    cache = DynamicCache(config=config)
    ways = {"accelerated": accelerate, "as it is": restore}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        accelerate(model)(torch.randint(1024, (1, asked.depth)), past_key_values=cache, logits_to_keep=1)
        for turn in range(asked.rounds + 1):
            logits: list[torch.Tensor] = []
            for name, way in ways.items():
                way(model)
                started = time.perf_counter()
                logits.append(model(torch.tensor([[5]]), past_key_values=cache).logits.float())
                if turn:  # the first one warms up
                    seconds[name].append(time.perf_counter() - started)
                cache.crop(-1)
            worst = (logits[0] - logits[1]).abs().max() / logits[1].abs().max()
    ours, theirs = (median(each) for each in seconds.values())
    print(
        f"{asked.depth} tokens, {asked.dtype}: {theirs * 1e3:.1f} ms as it is, {ours * 1e3:.1f} ms accelerated, "
        f"{theirs / ours:.1f}x; logits differ by {worst:.1e} of the largest"
    )


if __name__ == "__main__":
    main()
