"""Recorded decode steps give the bits that steps from Python give, and are left where they cannot be had."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine_models import CONFIGS, HY4, LONGCAT, SPARSE
from latentkv.engine.runner import Runner
from latentkv.engine.sequence import Sequence
from latentkv.kernels import BF16_BACKENDS, available_backends, use_backend
from latentkv.models import replay as module
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.packing import Packing, pack_module
from latentkv.ops import KVFormat
from latentkv.state import PagedCache
from latentkv.weights.formats import INT8

pytestmark = pytest.mark.skipif(len(available_backends()) == 1, reason="the native kernels were not built")

MODELS: dict[str, dict[str, Any]] = {
    "mla": {**CONFIGS["mla"], "q_lora_rank": 24},
    "softmax router": {**CONFIGS["mla"], "model_type": "deepseek_v2", "topk_method": "greedy", "norm_topk_prob": False},
    "gqa": CONFIGS["gqa"],
    "longcat": LONGCAT,
    "sparse": SPARSE,  # its first steps are dense, those after them are not
    "sparse, gated": {**SPARSE, "model_type": "axk2", "gated_norm_rank": 4, "n_group": None, "topk_group": None},
    "sparse, shared": {**SPARSE, "model_type": "glm_moe_dsa", "indexer_types": ["full", "shared"]},
}


def packed_decoder(config: dict[str, Any], **packing: Any) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(read_config(config)).bfloat16().eval().requires_grad_(False)
    decoder.keep_choices_exact()
    pack_module(decoder, Packing(**packing))
    return decoder


def decode(decoder: Decoder, kv_format: KVFormat, lens: list[int], steps: int) -> tuple[list[torch.Tensor], Runner]:
    cache = PagedCache(decoder.config.specs(kv_format), 40, page_size=8)
    runner = Runner(decoder, cache)
    sequences = [Sequence(i, [(7 * i + t) % 60 for t in range(n)], cache.pool.allocate(6)) for i, n in enumerate(lens)]
    for sequence in sequences:
        runner.read([sequence], [sequence.num_uncached])
    hidden: list[torch.Tensor] = []
    for step in range(steps):
        for sequence in sequences:
            sequence.tokens.append((5 * step + sequence.index) % 60)
        hidden.append(runner.read(sequences, [1] * len(sequences)))
    return hidden, runner


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("format_", [None, INT8], ids=["bf16", "int8"])
@pytest.mark.parametrize("lens", [[5], [3, 20, 9]])
def test_recorded_steps_give_the_same_bits(
    model: str, format_: Any, lens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = packed_decoder(MODELS[model], format=format_)
    recorded, runner = decode(decoder, "bf16", lens, 12)
    assert runner.replay.why_not is None
    assert [key[:2] for key in runner.replay._steps] == [(len(lens), len(lens))]  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(module, "MOST_ROWS", 0)
    plain, runner = decode(decoder, "bf16", lens, 12)
    assert not runner.replay._steps  # pyright: ignore[reportPrivateUsage]
    for own, expected in zip(recorded, plain, strict=True):
        assert torch.equal(own, expected)


@pytest.mark.parametrize("model", MODELS)
def test_drafts_of_any_lengths_are_recorded_and_give_the_bits_of_single_tokens(model: str) -> None:
    decoder = packed_decoder(MODELS[model])
    (single, _), (drafted, runner) = (read_drafts(decoder, draft) for draft in (False, True))
    assert [key[:2] for key in runner.replay._steps] == [(3, 8)]  # pyright: ignore[reportPrivateUsage]
    assert torch.equal(drafted, single)


def read_drafts(decoder: Decoder, draft: bool) -> tuple[torch.Tensor, Runner]:
    """Three sequences read 1, 3 and 4 tokens more, three times over: as drafts in one step, or one by one."""
    cache = PagedCache(decoder.config.specs("bf16"), 40, page_size=8)
    runner, lens = Runner(decoder, cache), (1, 3, 4)
    sequences = [Sequence(i, [(7 * i + t) % 60 for t in range(9 + 5 * i)], cache.pool.allocate(6)) for i in range(3)]
    for sequence in sequences:
        runner.read([sequence], [sequence.num_uncached])
    hidden: list[torch.Tensor] = []
    for step in range(3):
        new = [[(5 * step + i + t) % 60 for t in range(n)] for i, n in enumerate(lens)]
        for sequence, tokens in zip(sequences, new, strict=True):
            sequence.tokens.append(tokens[0])
            sequence.draft = tokens[1:] if draft else []
        if draft:
            hidden.append(runner.read(sequences, list(lens)))
        for sequence, tokens in zip(sequences, new, strict=True):
            sequence.tokens += tokens[1:]
            sequence.draft = []
            hidden += [runner.read([sequence], [1]) for _ in range(sequence.num_uncached)]
    return torch.cat(hidden), runner


@pytest.mark.parametrize(("kv_format", "model"), [("int8", "mla"), ("fp8", "mla"), ("int8", "sparse")])
def test_quantised_caches_are_recorded_too(kv_format: KVFormat, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = packed_decoder(MODELS[model])
    recorded, runner = decode(decoder, kv_format, [17], 5)
    assert runner.replay.why_not is None
    monkeypatch.setattr(module, "MOST_ROWS", 0)
    plain, _ = decode(decoder, kv_format, [17], 5)
    assert torch.equal(torch.stack(recorded), torch.stack(plain))


def test_int8_products_and_other_numbers_of_threads_are_recorded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = packed_decoder(MODELS["mla"])
    for layer in decoder.model.layers:
        layer.self_attn.int8_products = available_backends()[-1] in BF16_BACKENDS
    threads = torch.get_num_threads()
    try:
        recorded, runner = decode(decoder, "int8", [17], 3)
        torch.set_num_threads(2)
        more, _ = decode(decoder, "int8", [17], 3)
    finally:
        torch.set_num_threads(threads)
    assert runner.replay.why_not is None
    monkeypatch.setattr(module, "MOST_ROWS", 0)
    plain, _ = decode(decoder, "int8", [17], 3)
    assert torch.equal(torch.stack(recorded), torch.stack(plain))
    assert torch.equal(torch.stack(more), torch.stack(plain))


def test_steps_of_any_number_of_sequences_give_the_bits_of_plain_ones_whatever_was_recorded_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All recordings share their memory, the inputs and the intermediates."""
    decoder, lens = packed_decoder(MODELS["mla"]), [9, 4, 20, 7, 11, 3, 15, 8, 6, 13]
    counts = [3, 10, 1, 10, 3, 9, 1, 10]

    def run() -> tuple[list[torch.Tensor], Runner]:
        cache = PagedCache(decoder.config.specs("bf16"), 80, page_size=8)
        runner = Runner(decoder, cache)
        sequences = [
            Sequence(i, [(7 * i + t) % 60 for t in range(n)], cache.pool.allocate(6)) for i, n in enumerate(lens)
        ]
        for sequence in sequences:
            runner.read([sequence], [sequence.num_uncached])
        hidden: list[torch.Tensor] = []
        for step, count in enumerate(counts):
            for sequence in sequences[:count]:
                sequence.tokens.append((5 * step + sequence.index) % 60)
            hidden.append(runner.read(sequences[:count], [1] * count))
        return hidden, runner

    recorded, runner = run()
    assert [key[0] for key in runner.replay._steps] == [3, 9, 1, 10]  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(module, "MOST_STEPS", 2)
    few, runner = run()
    assert [key[0] for key in runner.replay._steps] == [1, 10]  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(module, "MOST_ROWS", 0)
    plain, _ = run()
    for own, again, expected in zip(recorded, few, plain, strict=True):
        assert torch.equal(own, expected)
        assert torch.equal(again, expected)


def test_steps_of_prompts_are_not_recorded() -> None:
    decoder = packed_decoder(MODELS["mla"])
    cache = PagedCache(decoder.config.specs("bf16"), 40, page_size=8)
    runner = Runner(decoder, cache)
    sequence = Sequence(0, list(range(1, 60)), cache.pool.allocate(8))
    sequence.draft = [5]  # whatever else a step has
    for count in (20, 30, module.MOST_EACH + 1):
        runner.read([sequence], [count])
    assert not runner.replay._steps  # pyright: ignore[reportPrivateUsage]


def test_a_step_on_torch_does_not_end_recording() -> None:
    decoder = packed_decoder(MODELS["mla"])
    with use_backend("torch"):
        _, runner = decode(decoder, "bf16", [5], 2)
        assert not runner.replay._steps  # pyright: ignore[reportPrivateUsage]
    assert runner.replay.why_not is None


def test_the_result_of_a_step_outlives_the_next() -> None:
    hidden, _ = decode(packed_decoder(MODELS["mla"]), "bf16", [5], 3)
    assert len({tuple(row.flatten().tolist()) for row in hidden}) == 3


def test_a_model_with_sinks_runs_its_steps_unrecorded_and_says_why() -> None:
    decoder = packed_decoder(HY4)
    hidden, runner = decode(decoder, "bf16", [3, 20], 8)
    again, _ = decode(decoder, "bf16", [3, 20], 8)
    assert "is computed by torch" in (runner.replay.why_not or "")
    assert torch.equal(torch.stack(hidden), torch.stack(again))


def test_models_that_torch_computes_say_why_they_are_not_recorded() -> None:
    torch.manual_seed(0)
    decoder = Decoder(read_config(CONFIGS["mla"])).eval().requires_grad_(False)
    hidden, runner = decode(decoder, "fp32", [5], 3)
    assert "is computed by torch" in (runner.replay.why_not or "")
    assert torch.stack(hidden).isfinite().all()
