"""Two models' logits side by side, held to float64."""

from __future__ import annotations

import pytest
import torch

from latentkv.engine.comparison import NOTHING, Comparison, blocks_of, compare_logits


def test_sums_are_those_of_float64():
    source, model = torch.randn(50, 97) * 3, torch.randn(50, 97) * 3
    targets = torch.randint(97, (50,))
    log_p, log_q = source.double().log_softmax(-1), model.double().log_softmax(-1)
    found = compare_logits(source, model, targets)
    assert found.source_nats == pytest.approx(-float(log_p[range(50), targets].sum()), rel=1e-6)
    assert found.nats == pytest.approx(-float(log_q[range(50), targets].sum()), rel=1e-6)
    assert found.divergence == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-5)
    assert found.same == int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    assert found.tokens == 50


def test_a_model_beside_itself_differs_in_nothing():
    logits, targets = torch.randn(20, 31), torch.randint(31, (20,))
    found = compare_logits(logits, logits.clone(), targets)
    assert (found.divergence, found.same, found.nats) == (0.0, 20, found.source_nats)


def test_of_a_padded_vocabulary_the_common_tokens_are_compared():
    source, targets = torch.randn(20, 31), torch.randint(31, (20,))
    padded = torch.cat([source, torch.full((20, 2), -20.0)], -1)
    found = compare_logits(source, padded, targets)
    assert found.divergence == pytest.approx(0, abs=1e-5)
    assert found.same == 20


def test_parts_add_up():
    source, model, targets = torch.randn(20, 31), torch.randn(20, 31), torch.randint(31, (20,))
    whole = compare_logits(source, model, targets)
    first, second = (compare_logits(source[rows], model[rows], targets[rows]) for rows in (slice(7), slice(7, 20)))
    assert vars(first + second) == pytest.approx(vars(whole), rel=1e-6)
    assert first + second != Comparison(0, 0, 0, 0, 0)


@pytest.mark.parametrize("vocab_size", [160, 49_152, 131_072])
def test_blocks_are_all_places_in_order_and_never_take_more_than_100_mib(vocab_size: int):
    blocks = list(blocks_of(30_000, vocab_size))
    assert [place for block in blocks for place in range(block.start, block.stop)] == list(range(30_000))
    # Of both models logits and log-softmax; p, the difference, and their product.
    assert max(block.stop - block.start for block in blocks) * vocab_size * 4 * 7 <= 100 << 20


def test_no_tokens_are_nothing():
    assert compare_logits(torch.randn(0, 31), torch.randn(0, 31), torch.randint(31, (0,))) == NOTHING
