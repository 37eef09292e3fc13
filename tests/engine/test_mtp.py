"""The paged MTP module drafts what the unpaged one does, whatever became of a sequence's pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from draft_oracle import CheckedMTPDrafter
from offload_cases import store_for

from engine_models import MTP, SPARSE_MTP, VOCAB, cache_for, tiny_decoder
from latentkv.engine import Engine, Request, SamplingParams, mtp
from latentkv.engine.mtp import MTPDrafter
from latentkv.kernels import available_backends
from latentkv.models import replay as replay_module
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.packing import Packing, pack_module
from latentkv.state import PagedCache

PROMPT = [(7 * i + i * i) % VOCAB for i in range(29)]


def ask(prompt: list[int], **params) -> Request:
    params = {"max_tokens": 12, "ignore_eos": True, "temperature": 0, **params}
    return Request.create(prompt, SamplingParams(**params), vocab_size=VOCAB, max_context=128)


def engine_with(
    pages: int = 40, *, kind: str = "mtp", cache_dir: Path | None = None, **options
) -> tuple[Engine, CheckedMTPDrafter]:
    decoder = tiny_decoder(kind)
    cache = cache_for(decoder, pages)
    drafter = CheckedMTPDrafter(decoder, cache)
    store = None if cache_dir is None else store_for(cache_dir, cache)
    return Engine(decoder, cache, drafter=drafter, store=store, **options), drafter


@pytest.mark.parametrize(
    ("most", "temperature", "step_tokens"),  # every two meet; in every run each value does
    [
        pytest.param(most, (0, 1.0)[(most + i) % 2], step_tokens, marks=pytest.mark.slow if (most + i) % 3 else ())
        for most in (1, 2, 3, 4)
        for i, step_tokens in enumerate((3, 8, 64))
    ],
)
def test_drafts_are_those_of_the_unpaged_module(most: int, temperature: float, step_tokens: int) -> None:
    engine, drafter = engine_with(most_drafted=most, step_tokens=step_tokens)
    prompts = [PROMPT, PROMPT[:1], PROMPT[3:12]]
    list(engine.run([ask(prompt, temperature=temperature, seed=5) for prompt in prompts]))
    assert drafter.checked[most] >= 3


@pytest.mark.parametrize("step_tokens", [3, 64])
def test_a_module_with_an_indexer_drafts_what_it_does_unpaged(step_tokens: int) -> None:
    engine, drafter = engine_with(kind="sparse mtp", most_drafted=2, step_tokens=step_tokens)
    list(engine.run([ask(prompt) for prompt in (PROMPT, PROMPT[:1], PROMPT[3:12])]))
    assert drafter.checked[2] >= 3


def test_a_prefix_that_another_has_read_serves_drafts_as_well() -> None:
    engine, drafter = engine_with(most_drafted=3)
    list(engine.run([ask(PROMPT[:24], max_tokens=1)]))
    assert not drafter.checked
    list(engine.run([ask([*PROMPT[:24], 1, 2]), ask([*PROMPT[:16], 4])]))
    assert engine.counters.prefix_hits == 24 + 16
    assert drafter.checked[3] > 6


def test_an_answer_that_drafted_nothing_serves_as_a_prefix_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, drafter = engine_with(most_drafted=0)
    first = [event.token_id for event in engine.run([ask(PROMPT[:5], max_tokens=30)])]
    monkeypatch.setattr(engine, "_most_drafted", 2)
    list(engine.run([ask([*PROMPT[:5], *first, 9], max_tokens=5)]))
    assert engine.counters.prefix_hits == 32
    assert drafter.checked[2] > 0


def test_without_drafts_the_module_reads_once_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, drafter = engine_with(most_drafted=0)
    reads: list[int] = []
    read = MTPDrafter._catch_up  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(MTPDrafter, "_catch_up", lambda self, due: reads.append(len(due)) or read(self, due))
    list(engine.run([ask(PROMPT[:8], max_tokens=33)]))
    assert reads == [1] * 5  # 40 tokens were read
    assert drafter.checked == {}


def test_a_sequence_that_gave_its_pages_back_drafts_as_before() -> None:
    engine, drafter = engine_with(pages=7, most_drafted=2)
    list(engine.run([ask(PROMPT[i : i + 9], max_tokens=24, temperature=1.0, seed=i) for i in range(3)]))
    assert engine.counters.preemptions > 0
    assert drafter.checked[2] > 20


def test_a_draft_is_never_longer_than_what_is_left_to_write() -> None:
    engine, drafter = engine_with(most_drafted=4)
    list(engine.run([ask(PROMPT, max_tokens=1), ask(PROMPT[::-1], max_tokens=3)]))
    assert set(drafter.checked) <= {1, 2}


def test_a_prefix_that_comes_back_from_files_serves_drafts_as_well(tmp_path: Path) -> None:
    prompt = [*PROMPT, *PROMPT[3:9]]
    first, _ = engine_with(cache_dir=tmp_path, most_drafted=0)
    list(first.run([ask(prompt, max_tokens=1)]))
    first.close()
    engine, drafter = engine_with(cache_dir=tmp_path, most_drafted=3)
    list(engine.run([ask(prompt, max_tokens=8)]))
    engine.close()
    assert engine.counters.store_hits == 32
    assert drafter.checked[3] > 0


@pytest.mark.skipif(len(available_backends()) == 1, reason="the native kernels were not built")
@pytest.mark.parametrize("config", [MTP, SPARSE_MTP], ids=["dense", "sparse"])
def test_recorded_steps_draft_the_same(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    decoder = Decoder(read_config({**config, "q_lora_rank": 24})).bfloat16().eval().requires_grad_(False)
    decoder.keep_choices_exact()
    pack_module(decoder, Packing())

    def drafts() -> tuple[list[list[int]], MTPDrafter]:
        cache = PagedCache(decoder.config.specs("bf16", mtp=torch.bfloat16), 40, page_size=8)
        drafter = mtp.MTPDrafter(decoder, cache)
        proposed: list[list[int]] = []
        propose = drafter.propose

        def spy(wishes, seconds):
            proposed.extend(result := propose(wishes, seconds))
            return result

        monkeypatch.setattr(drafter, "propose", spy)
        list(Engine(decoder, cache, drafter=drafter, most_drafted=3).run([ask(PROMPT, max_tokens=20)]))
        return proposed, drafter

    recorded, drafter = drafts()
    assert drafter._replay.why_not is None  # pyright: ignore[reportPrivateUsage]
    assert drafter._replay._steps  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(replay_module, "MOST_ROWS", 0)
    plain, drafter = drafts()
    assert not drafter._replay._steps  # pyright: ignore[reportPrivateUsage]
    assert recorded == plain
    assert any(recorded)
