"""How far a converted model is from its source on a batch: what healing makes smaller.

Of several processes each has its part of the batch; the mean of what they find is what one would find of all of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentkv.models.decoder import Decoder, DecoderLayer
from latentkv.train.ranks import DataRanks


def divergence(student: Decoder, teacher: Decoder, batch: Tensor, ranks: DataRanks) -> Tensor:
    """KL(teacher || student) in nats a token; every process has as many of them."""
    with torch.no_grad():
        wanted = teacher.logits(teacher.forward_train(batch)).log_softmax(-1)
    found = student.logits(student.forward_train(batch)).log_softmax(-1)
    return functional.kl_div(found.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True)


def mismatch(student: Decoder, teacher: Decoder, batch: Tensor, ranks: DataRanks) -> Tensor:
    """|converted - source|^2 / |source|^2 of the attention's output, mean over layers, on the source's own states."""
    inputs, wanted = _attention(teacher, batch)
    energies = ranks.mean(torch.stack([each.square().sum() for each in wanted]))
    total = torch.zeros(())
    for ours, theirs, energy in zip(student.attention_outputs(inputs), wanted, energies, strict=True):
        total = total + (ours - theirs).square().sum() / energy
    return total / len(wanted)


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
