import pytest
import torch

from engine_models import CONFIGS, VOCAB, cache_for, tiny_decoder
from latentkv.engine import runner as runner_module
from latentkv.engine import scoring
from latentkv.engine.runner import Runner
from latentkv.errors import CacheError
from latentkv.models.decoder import Decoder

TOKENS = torch.randint(VOCAB, (101,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture(params=CONFIGS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return tiny_decoder(request.param)


@torch.inference_mode()
def whole(decoder: Decoder, tokens: list[int]) -> torch.Tensor:
    return decoder.logits(decoder.forward_train(torch.tensor([tokens]))[0])


def brute_score(decoder: Decoder, tokens: list[int], context: int) -> tuple[float, list[int]]:
    """Nats and the likeliest of each token under the first window that holds it, one forward pass a token."""
    total, likeliest = 0.0, []
    for i in range(1, len(tokens)):
        start = 0
        while start + context <= i:
            start += max(1, context // 2)
        logits = whole(decoder, tokens[start:i])[-1].double()
        total -= float(logits.log_softmax(-1)[tokens[i]])
        likeliest.append(int(logits.argmax()))
    return total, likeliest


@pytest.mark.thin(meet=1)
@pytest.mark.parametrize("context", [2, 3, 16, 17, 64, 100, 101, 128])
def test_a_texts_score_is_that_of_the_brute_force(decoder: Decoder, context: int):
    nats, likeliest = brute_score(decoder, TOKENS, context)
    for pages in (16, 100):
        cache = cache_for(decoder, pages)
        score = scoring.score_text(Runner(decoder, cache), TOKENS, context)
        assert score.nats == pytest.approx(nats, rel=1e-5)
        assert score.likeliest.tolist() == likeliest
        assert cache.pool.free_pages == pages


def test_cutting_steps_and_logits_changes_nothing(decoder: Decoder, monkeypatch: pytest.MonkeyPatch):
    runner = Runner(decoder, cache_for(decoder, 100))
    score = scoring.score_text(runner, TOKENS, 32)
    logits = scoring.sequence_logits(runner, TOKENS)
    monkeypatch.setattr(scoring, "PREFILL_CHUNK", 7)
    monkeypatch.setattr(runner_module, "_LOGIT_BYTES", 3 * 4 * VOCAB)
    cut = scoring.score_text(runner, TOKENS, 32)
    assert cut.nats == pytest.approx(score.nats, rel=1e-6) and torch.equal(cut.likeliest, score.likeliest)
    torch.testing.assert_close(scoring.sequence_logits(runner, TOKENS), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, whole(decoder, TOKENS), rtol=1e-4, atol=1e-4)


def test_windows_score_every_token_but_the_first_once_with_half_a_context_before_it():
    for total in (2, 10, 31, 32, 33, 100):
        for context in (2, 3, 8, 32):
            scored: list[int] = []
            for window in scoring.windows(total, context):
                assert window.stop - window.start <= context
                assert window.scored - window.start >= (1 if window.start == 0 else context // 2)
                scored += range(window.scored, window.stop)
            assert scored == list(range(1, total))


def test_too_few_pages_are_an_error_and_none_is_lost(decoder: Decoder):
    cache = cache_for(decoder, 3)
    with pytest.raises(CacheError, match="cache is full"):
        scoring.score_text(Runner(decoder, cache), TOKENS, 64)
    with pytest.raises(CacheError, match="cache is full"):
        scoring.sequence_logits(Runner(decoder, cache), TOKENS)
    assert cache.pool.free_pages == 3


def test_a_step_is_shared_out_first_come_first_served():
    sequences = [runner_module.Sequence(i, [0] * n) for i, n in enumerate((3, 4, 5))]
    chosen, counts = runner_module.share_out(sequences, 5)
    assert (chosen, counts) == (sequences[:2], [3, 2])
    sequences[0].num_cached = 3
    assert runner_module.share_out(sequences, 100) == (sequences[1:], [4, 5])
