"""Moments and costs against their definitions, written out in loops."""

from __future__ import annotations

import torch

from latentkv.convert.attention import GQAWeights, HeadShape
from latentkv.convert.statistics import AttentionProfile, layer_statistics

SHAPE = HeadShape(num_heads=4, num_kv_heads=2, head_dim=6)
HIDDEN, LENGTH = 10, 7


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_token_counts_its_squared_attention_and_a_score_what_it_moves_the_output() -> None:
    q, k, v = (randn(LENGTH, 4, 6, seed=i).float() for i in range(3))
    o = randn(HIDDEN, 24, seed=3).float()
    profile = AttentionProfile.empty(4, LENGTH)
    counted = profile.add(q, k, v, o, 0.3)
    distances, tokens = torch.zeros(LENGTH, dtype=torch.float64), torch.zeros(LENGTH, dtype=torch.float64)
    for head in range(4):
        cost = squares = 0.0
        projection = o[:, head * 6 : head * 6 + 6].double()
        for t in range(LENGTH):
            p = (q[t, head].double() @ k[: t + 1, head].double().mT * 0.3).softmax(0)
            output = p @ v[: t + 1, head].double()
            for s in range(t + 1):
                distances[t - s] += p[s]
                tokens[s] += p[s] ** 2 / 4
                squares += float(p[s] ** 2)
                apart = projection @ (v[s, head].double() - output)
                cost += float(p[s] ** 2 * apart.square().sum()) * 0.3**2
        assert abs(float(profile.costs[head]) / cost - 1) < 1e-4
        assert abs(float(profile.squares[head]) / squares - 1) < 1e-4
    torch.testing.assert_close(profile.distances, distances, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(counted, tokens, rtol=1e-4, atol=1e-6)


def test_moments_are_the_same_however_the_text_is_cut_and_weigh_tokens_as_they_count() -> None:
    weights = GQAWeights(randn(24, HIDDEN), randn(12, HIDDEN, seed=1), randn(12, HIDDEN, seed=2), randn(HIDDEN, 24))
    x, counted = randn(30, HIDDEN, seed=4).float(), randn(30, seed=5).square()
    profile = AttentionProfile.empty(4, LENGTH)
    profile.add(*(randn(LENGTH, 4, 6, seed=i).float() for i in range(3)), weights.o.float(), 0.3)
    whole = layer_statistics(weights, [(x, counted)], profile, SHAPE)
    pieces = zip(x.split(11), counted.split(11), strict=True)
    cut = layer_statistics(weights, pieces, profile, SHAPE)
    torch.testing.assert_close(whole.kv_moment, cut.kv_moment, rtol=1e-6, atol=1e-8)
    y = torch.cat([x.double() @ weights.k.mT, x.double() @ weights.v.mT], dim=1)
    share = counted / counted.sum()
    torch.testing.assert_close(whole.kv_moment, (y * share[:, None]).mT @ y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.kv_mean, share @ y, rtol=1e-4, atol=1e-5)
    q = (x.double() @ weights.q.mT).unflatten(1, (4, 6))
    torch.testing.assert_close(whole.query_moments[2], q[:, 2].mT @ q[:, 2] / 30, rtol=1e-4, atol=1e-5)
    assert abs(float(whole.distances.sum()) - 1) < 1e-12
