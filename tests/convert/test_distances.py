"""What healing makes smaller, held to its definition in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sources import some_tokens
from torch import Tensor

from latentkv.convert import distances
from latentkv.convert.distances import backward_distance, backward_mismatch
from latentkv.models.decoder import Decoder
from latentkv.models.loading import load_model
from latentkv.train.ranks import DataRanks

pytestmark = pytest.mark.usefixtures("unpainted")

OF_ONE = pytest.mark.parametrize("models", ["llama"], indirect=True)
BATCH = some_tokens(3, 21)


def load(models: tuple[Path, Path]) -> tuple[Decoder, Decoder]:
    source, folder = models
    return load_model(folder, dtype=torch.float32), load_model(source, dtype=torch.float32).requires_grad_(False)


def reference(student: Decoder, teacher: Decoder, weight: float) -> tuple[float, float, dict[str, Tensor]]:
    """KL, the states' error and the gradients of their sum, in float64 from whole logits."""
    student, teacher = student.double(), teacher.double()
    ours, theirs = student.forward_train(BATCH), teacher.forward_train(BATCH)
    p, q = (
        (h @ m.model.embed_tokens.weight.mT if m.is_tied else m.lm_head(h))
        for m, h in ((teacher, theirs), (student, ours))
    )
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    hidden = (ours - theirs).square().sum() / theirs.square().sum()
    student.zero_grad()
    (divergence + weight * hidden).backward()
    gradients = {name: each.grad.clone() for name, each in student.named_parameters() if each.grad is not None}
    return float(divergence.detach()), float(hidden.detach()), gradients


@OF_ONE
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_losses_and_gradients_are_those_of_the_definition_however_the_logits_are_cut(
    models: tuple[Path, Path], weight: float, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distances, "_CHUNK_TOKENS", 10)  # the last piece is smaller
    student, teacher = load(models)
    found = backward_distance(student, teacher, BATCH, DataRanks(), hidden_weight=weight, recompute=recompute)
    gradients = {name: each.grad.clone() for name, each in student.named_parameters() if each.grad is not None}
    divergence, hidden, wanted = reference(student, teacher, weight)
    assert float(found.divergence) == pytest.approx(divergence, rel=1e-5)
    assert float(found.hidden) == pytest.approx(hidden if weight else 0.0, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert float((gradient - wanted[name]).norm()) <= 2e-5 * float(wanted[name].norm()), name


@OF_ONE
def test_recomputing_layers_gives_the_same_gradients_bit_for_bit(models: tuple[Path, Path]) -> None:
    found: list[dict[str, Tensor]] = []
    for recompute in (False, True):
        student, teacher = load(models)
        backward_distance(student, teacher, BATCH, DataRanks(), hidden_weight=1.0, recompute=recompute)
        found.append({name: each.grad for name, each in student.named_parameters() if each.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], gradient) for name, gradient in found[1].items())


@OF_ONE
def test_a_model_is_at_no_distance_from_itself(models: tuple[Path, Path]) -> None:
    student, _ = load(models)
    found = backward_distance(
        student, load_model(models[1], dtype=torch.float32), BATCH, DataRanks(), hidden_weight=1.0, recompute=False
    )
    assert float(found.divergence) == pytest.approx(0, abs=1e-6) and float(found.hidden) < 1e-10
    assert float(backward_mismatch(student, load_model(models[1], dtype=torch.float32), BATCH, DataRanks())) < 1e-10
