"""Windows of text, held to transformers in float64."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from latentkv import LLM
from latentkv.evaluate import scoring
from latentkv.evaluate.passages import Text
from latentkv.evaluate.report import report_text
from latentkv.evaluate.scoring import Windows, score_pieces

SIZE = 48


def exact_log_probs(folder: Path, windows: Windows) -> list[torch.Tensor]:
    """Of every token at each place of each window, in float64."""
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, local_files_only=True)
    with torch.no_grad():
        return [exact(torch.tensor([[windows.first, *ids[:-1]]])).logits[0].log_softmax(-1) for ids in windows.ids]


def test_windows_hold_every_token_once(model: LLM, text: Text):
    pieces = text.pieces(3000)
    windows = Windows.of(model, pieces, SIZE)
    assert model.tokenizer is not None
    ids = [token for piece in pieces for token in model.tokenizer.encode(piece, add_bos=False)]
    assert [token for window in windows.ids for token in window] == ids
    assert max(windows.sizes) == SIZE and sum(windows.sizes) == len(ids)
    assert windows.first == 0


def test_every_figure_is_that_of_float64(folders: dict[str, Path], source: LLM, model: LLM, text: Text):
    pieces = text.pieces(3000)
    found, alone = score_pieces(model, source, pieces, SIZE), score_pieces(model, None, pieces, SIZE)
    windows = Windows.of(model, pieces, SIZE)
    wanted, ours = exact_log_probs(folders["source"], windows), exact_log_probs(folders["model"], windows)
    for index, (log_p, log_q, ids) in enumerate(zip(wanted, ours, windows.ids, strict=True)):
        assert found.source_nats and found.divergence and found.same
        places = range(len(ids)), list(ids)
        assert found.source_nats[index] == pytest.approx(-float(log_p[places].sum()), rel=1e-5)
        assert found.nats[index] == pytest.approx(-float(log_q[places].sum()), rel=1e-5)
        assert alone.nats[index] == pytest.approx(found.nats[index], rel=1e-5)
        assert found.divergence[index] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-4)
        assert found.same[index] == int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    assert (alone.tokens, alone.bytes) == (found.tokens, found.bytes)
    assert alone.source_nats is None

    report, tokens = report_text(found), sum(found.tokens)
    nats = sum(-float(each[range(len(ids)), list(ids)].sum()) for each, ids in zip(ours, windows.ids, strict=True))
    assert report.model.perplexity and report.pair
    assert report.model.perplexity.mean == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert report.model.bits_per_byte.mean == pytest.approx(
        nats / math.log(2) / len("".join(pieces).encode()), rel=1e-5
    )
    gaps = [
        float((log_p - log_q)[range(len(ids)), list(ids)].sum())
        for log_p, log_q, ids in zip(wanted, ours, windows.ids, strict=True)
    ]
    assert report.pair.difference.mean == pytest.approx(sum(gaps) / tokens, rel=1e-4)


def test_differences_of_pairs_are_surer_than_either_model_alone(source: LLM, text: Text, folders: dict[str, Path]):
    rounded = LLM(folders["source"], weights="int8", dtype="bf16", kv_cache_bytes=1 << 20)
    report = report_text(score_pieces(rounded, source, text.pieces(6000), SIZE))
    assert report.pair and report.pair.difference.error and report.model.bits_per_byte.error
    error_of_nats = report.model.bits_per_byte.error * math.log(2) * report.bytes / report.model.tokens
    assert report.pair.difference.error < error_of_nats / 2
    assert report.pair.agreement.mean > 0.5 and report.pair.divergence.mean > 0


def test_a_model_beside_itself_differs_in_nothing(source: LLM, text: Text):
    report = report_text(score_pieces(source, source, text.pieces(2000), SIZE))
    assert report.pair is not None
    assert (report.pair.divergence.mean, report.pair.agreement.mean, report.pair.difference.mean) == (0.0, 1.0, 0.0)
    assert report.model == report.source


def test_models_with_other_tokens_have_figures_of_their_own_and_none_of_pairs(
    source: LLM, text: Text, folders: dict[str, Path]
):
    other = LLM(folders["other"], kv_cache_bytes=1 << 20)
    pieces = text.pieces(2000)
    found = score_pieces(other, source, pieces, SIZE)
    assert found.source_tokens is not None and sum(found.tokens) != sum(found.source_tokens)
    assert found.divergence is None and report_text(found).pair is None
    assert found.nats == score_pieces(other, None, pieces, SIZE).nats
    assert found.source_nats == score_pieces(source, None, pieces, SIZE).nats


def test_two_models_compute_in_one_thread_and_none_is_warned_of_the_other(
    source: LLM, model: LLM, text: Text, caplog: pytest.LogCaptureFixture
):
    threads = set[int]()
    read = scoring.hidden_states

    def noted(*given):
        threads.add(threading.get_ident())
        return read(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "hidden_states", noted)
        score_pieces(model, source, text.pieces(2000), SIZE)
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert "Another thread" not in caplog.text
