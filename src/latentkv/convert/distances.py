"""How far a converted model is from its source on a batch: what healing makes smaller.

Of several processes each has its part of the batch; the mean of what they find is what one would find of all of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentkv.models.decoder import Decoder, DecoderLayer
from latentkv.train.ranks import DataRanks

_CHUNK_TOKENS = 256
"""Tokens whose logits exist at a time; those of a vocabulary of 128k take 128 MiB in float32."""


@dataclass(frozen=True)
class Distance:
    """How far the student's predictions are from the teacher's, over the tokens of this process; scalars, detached.

    Attributes:
        divergence: KL(teacher || student) in nats a token.
        hidden: |student - teacher|^2 / |teacher|^2 of the states after the last norm.
    """

    divergence: Tensor
    hidden: Tensor


def backward_distance(
    student: Decoder, teacher: Decoder, batch: Tensor, ranks: DataRanks, *, hidden_weight: float, recompute: bool
) -> Distance:
    """Backpropagate KL + `hidden_weight` x the states' error, with the logits of a few tokens at a time in memory.

    Args:
        student: what learns.
        teacher: what it learns from, of the same vocabulary and, if `hidden_weight` is not 0, hidden size.
        batch: [B, S] int64; every process has as many tokens.
        ranks: the processes.
        hidden_weight: of the states' error.
        recompute: compute the student's layers once more for the backward pass instead of keeping what they gave.
    """
    with torch.no_grad():
        wanted = teacher.forward_train(batch).flatten(0, 1)
    found = student.forward_train(batch, recompute=recompute)
    # The head is gone backward through piece by piece, up to this leaf.
    leaf = found.detach().requires_grad_()
    states = leaf.flatten(0, 1)
    divergence = torch.zeros((), dtype=torch.float32)
    for ours, theirs in zip(states.split(_CHUNK_TOKENS), wanted.split(_CHUNK_TOKENS), strict=True):
        with torch.no_grad():
            target = teacher.logits(theirs).log_softmax(-1)
        log_q = student.logits(ours).log_softmax(-1)
        part = functional.kl_div(log_q, target, reduction="sum", log_target=True) / len(states)
        part.backward()
        divergence += part.detach()
    hidden = torch.zeros(())
    if hidden_weight:
        energy = ranks.mean(wanted.float().square().sum())
        hidden = (states.float() - wanted.float()).square().sum() / energy
        (hidden_weight * hidden).backward()
    found.backward(leaf.grad)
    return Distance(divergence, hidden.detach())


def backward_mismatch(student: Decoder, teacher: Decoder, batch: Tensor, ranks: DataRanks) -> Tensor:
    """Backpropagate |converted - source|^2 / |source|^2 of the attention's output on the source's own states.

    Returns:
        The mean over layers, detached.
    """
    inputs, wanted = _attention(teacher, batch)
    energies = ranks.mean(torch.stack([each.float().square().sum() for each in wanted]))
    total = torch.zeros(())
    for ours, theirs, energy in zip(student.attention_outputs(inputs), wanted, energies, strict=True):
        total = total + (ours.float() - theirs.float()).square().sum() / energy
    error = total / len(wanted)
    error.backward()
    return error.detach()


@torch.no_grad()
def _attention(model: Decoder, batch: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What the attention of each layer is given, and what it gives, [B, S, hidden] each."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def note(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        inputs.append(given[0])
        outputs.append(output)

    layers = cast("Iterable[DecoderLayer]", model.model.layers)
    noting = [layer.self_attn.register_forward_hook(note) for layer in layers]
    try:
        model.forward_train(batch)
    finally:
        for each in noting:
            each.remove()
    return inputs, outputs
