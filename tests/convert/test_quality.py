"""Two models compared on sequences: in bounded memory, and by several processes as by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sources import some_tokens, write_source
from torch import Tensor

from latentkv.convert.quality import compare
from latentkv.engine import comparison
from latentkv.models.decoder import Decoder
from latentkv.models.loading import load_model
from latentkv.train.ranks import DataRanks

TOKENS = some_tokens(sequences=10, length=33)


class OneOfSeveral(DataRanks):
    """One process of several whose sums are those of its own part."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Decoder]:
    folders: list[Path] = [write_source(name, tmp_path_factory.mktemp("m") / name) for name in ("llama", "mistral")]
    first, second = (load_model(folder, dtype=torch.float32) for folder in folders)
    return first, second


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens' logits were asked for at a time, where a comparison has room for 25."""
    found: list[int] = []
    logits = Decoder.logits

    def noted(self: Decoder, hidden: Tensor) -> Tensor:
        found.append(hidden.shape[:-1].numel())
        return logits(self, hidden)

    monkeypatch.setattr(Decoder, "logits", noted)
    monkeypatch.setattr(comparison, "_BLOCK_BYTES", 25 * 160 * 4 * comparison._TENSORS)
    return found


def test_only_a_block_of_logits_is_there_at_a_time(models: tuple[Decoder, Decoder], asked: list[int]):
    source, converted = models
    found = compare(source, converted, TOKENS)
    assert max(asked) == 25 and sum(asked) == 2 * TOKENS[:, 1:].numel()
    logits = [model.logits(model.forward_train(TOKENS[:, :-1])).flatten(0, 1) for model in models]
    log_p, log_q = (each.detach().double().log_softmax(-1) for each in logits)
    targets = TOKENS[:, 1:].flatten()
    places = torch.arange(len(targets)), targets
    assert found["source"] == pytest.approx(float((-log_p[places].mean()).exp()), rel=1e-5)
    assert found["converted"] == pytest.approx(float((-log_q[places].mean()).exp()), rel=1e-5)
    assert found["divergence"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-5)
    assert found["agreement"] == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_process_computes_as_often_and_each_token_counts_once(
    models: tuple[Decoder, Decoder], asked: list[int], size: int
):
    whole = compare(*models, TOKENS)
    calls: list[list[int]] = []
    parts = []
    for rank in range(size):
        asked.clear()
        parts.append(compare(*models, TOKENS, ranks=OneOfSeveral(rank, size)))
        calls.append(list(asked))
    assert all(each == calls[0] for each in calls)
    assert sum(part["tokens"] for part in parts) == whole["tokens"]
    for name in ("divergence", "agreement"):
        assert sum(part[name] * part["tokens"] for part in parts) == pytest.approx(whole[name] * whole["tokens"])
