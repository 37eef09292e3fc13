"""Recorded decode steps of hybrids give the bits of steps from Python, drafts or not, in every cache format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from latentkv.kernels import available_backends
from latentkv.models.batch import Batch, SlotUse
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.packing import Packing, pack_module
from latentkv.models.replay import Replay, why_not_recorded
from latentkv.ops import KVFormat
from latentkv.state import PagedCache
from latentkv.weights.formats import INT8

pytestmark = pytest.mark.skipif(len(available_backends()) == 1, reason="the native kernels were not built")

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_nextn_predict_layers": 0,
}
BAILING = SIZES | {"model_type": "bailing_hybrid", "layer_group_size": 2, "head_dim": 16}
KIMI = SIZES | {
    "model_type": "kimi_linear",
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_heads": 2,
    "linear_head_dim": 16,
}
GLM5 = SIZES | {
    "model_type": "glm5_next",
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
    "qk_rope_head_dim": 0,
    "q_lora_rank": 12,
    "linear_num_heads": 2,
    "linear_head_dim": 16,
    "index_topk": 4,
    "index_kpool": 2,
    "index_head_dim": 16,
    "index_n_heads": 3,
    "hc_mult": 2,
    "swiglu_limit": 0.1,
}
MODELS: dict[str, dict[str, Any]] = {
    "bailing": BAILING,
    "bailing, limited, q LoRA": BAILING
    | {
        "q_lora_rank": 12,
        "expert_swiglu_limit_list": [0, 0.1, 0.2, 0],
        "share_expert_swiglu_limit_list": [0, 0.1, 0, 0],
        "gated_attention_proj_granularity_type": "element_wise",
    },
    "kimi": KIMI,
    "kimi without rotary dimensions": KIMI | {"qk_rope_head_dim": 0},
    "glm5": GLM5,
    "glm5 that reads whole pools alone, shared": GLM5
    | {
        "layer_types": ["linear_attention", "indexed_attention", "indexed_attention", "linear_attention"],
        "indexer_types": ["full", "full", "shared", "full"],
        "index_kpool_always_select_tail": False,
    },
}
MODELS["ling25"] = BAILING | {"architectures": ["BailingMoeV2_5ForCausalLM"], "group_norm_size": 2, "q_lora_rank": 12}
PAGES = [[3, 0, 5], [1, 7, 2], [4, 6, 8]]


class Text:
    """Three sequences in one cache, read from step to step."""

    def __init__(self, decoder: Decoder, kv_format: KVFormat, *, recorded: bool) -> None:
        specs = decoder.config.specs(kv_format, most_drafted=3)
        self.decoder = decoder
        self.cache = PagedCache(specs, 9, page_size=8, num_slots=4)
        self.replay = Replay(decoder.run_layers, self.cache, why_not_recorded(decoder) if recorded else "not asked")
        self.lens = [0, 0, 0]
        self.pending = [0, 0, 0]

    def read(self, counts: list[int], committed: list[int] | None = None) -> Tensor:
        """Hidden states of the next tokens of each sequence, which are the same whenever they are read."""
        committed = committed or counts
        uses = [SlotUse(3 - b, self.pending[b], committed[b]) for b in range(3)]
        tokens = [
            [(7 * b + 5 * t) % 60 for t in range(n, n + count)]
            for b, (n, count) in enumerate(zip(self.lens, counts, strict=True))
        ]
        batch = Batch.build(tokens, self.lens, PAGES, page_size=8, slots=uses)
        self.pending = [0, 0, 0]
        self.lens = [n + count for n, count in zip(self.lens, committed, strict=True)]
        with torch.inference_mode():
            hidden = self.replay.hidden(batch, self.decoder.inputs)
            return self.decoder(batch, self.cache, form="absorbed") if hidden is None else hidden


def packed_decoder(config: dict[str, Any], **packing: Any) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(read_config(config)).bfloat16().eval().requires_grad_(False)
    decoder.keep_choices_exact()
    pack_module(decoder, Packing(**packing))
    return decoder


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("format_", [None, INT8], ids=["bf16", "int8"])
def test_recorded_steps_give_the_same_bits(model: str, format_: Any) -> None:
    decoder = packed_decoder(MODELS[model], format=format_)
    plain, recorded = (Text(decoder, "bf16", recorded=asked) for asked in (False, True))
    for counts in ([5, 9, 3], *[[1, 1, 1]] * 6):
        assert torch.equal(recorded.read(counts), plain.read(counts))
    assert recorded.replay.why_not is None
    assert len(recorded.replay._steps) == 1  # pyright: ignore[reportPrivateUsage]
    assert not plain.replay._steps  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("kv_format", ["int8", "fp8"])
def test_quantised_caches_are_recorded_too(kv_format: KVFormat) -> None:
    for config in (BAILING, MODELS["kimi without rotary dimensions"], GLM5):
        decoder = packed_decoder(config)
        plain, recorded = (Text(decoder, kv_format, recorded=asked) for asked in (False, True))
        for counts in ([5, 9, 3], *[[1, 1, 1]] * 3):
            assert torch.equal(recorded.read(counts), plain.read(counts))
        assert recorded.replay.why_not is None


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("model", ["bailing", "kimi", "glm5", "ling25"])
def test_drafts_that_are_accepted_in_part_give_the_bits_of_single_tokens(model: str, recorded: bool) -> None:
    decoder = packed_decoder(MODELS[model])
    single, drafted = Text(decoder, "bf16", recorded=False), Text(decoder, "bf16", recorded=recorded)
    for text in (single, drafted):
        text.read([9, 6, 5])
    expected = torch.stack([single.read([1, 1, 1]) for _ in range(12)], dim=1)  # [3, 12, hidden]
    done = [0, 0, 0]
    for accepted in ([1, 0, 2], [0, 0, 0], [2, 1, 0], [1, 2, 0]):
        counts = [2, 3, 3]
        hidden = drafted.read(counts, [1, 1, 1]).split(counts)
        for b, rows in enumerate(hidden):
            accepted[b] = min(accepted[b], counts[b] - 1)
            assert torch.equal(rows[: 1 + accepted[b]], expected[b, done[b] : done[b] + 1 + accepted[b]])
            done[b] += 1 + accepted[b]
            drafted.lens[b] += accepted[b]
        drafted.pending = accepted
    steps = drafted.replay._steps  # pyright: ignore[reportPrivateUsage]
    assert [key[:2] for key in steps] == ([(3, 8)] if recorded else [])


@pytest.mark.parametrize("model", ["bailing", "glm5", "ling25"])
def test_a_prompt_cut_anywhere_gives_the_same_bits_in_recurrent_layers(model: str) -> None:
    decoder = packed_decoder(MODELS[model])
    texts = [Text(decoder, "bf16", recorded=False) for _ in range(2)]
    for counts in ([14, 20, 7],):
        whole = texts[0].read(counts).split(counts)
    pieces = [texts[1].read(counts).split(counts) for counts in ([3, 1, 5], [10, 18, 1], [1, 1, 1])]
    for b, rows in enumerate(whole):
        assert torch.equal(torch.cat([piece[b] for piece in pieces]), rows)
    for mine, theirs in zip(texts[1].cache.slot_storage, texts[0].cache.slot_storage, strict=True):
        assert torch.equal(mine, theirs)
