"""How far a converted model is from its source on a batch: what healing makes smaller."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from latentkv.models.decoder import Decoder, DecoderLayer


def divergence(student: Decoder, teacher: Decoder, batch: Tensor) -> Tensor:
    """KL(teacher || student) in nats a token."""
    with torch.no_grad():
        wanted = teacher.logits(teacher.forward_train(batch)).log_softmax(-1)
    found = student.logits(student.forward_train(batch)).log_softmax(-1)
    return functional.kl_div(found.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True)


def mismatch(student: Decoder, teacher: Decoder, batch: Tensor) -> Tensor:
    """|converted - source|^2 / |source|^2 of the attention's output, mean over layers, on the source's own states."""
    x = teacher.embed(batch)
    positions, own = (model.angles(batch.shape[1]) for model in (teacher, student))
    total = torch.zeros(())
    layers = zip(teacher.model.layers, student.model.layers, strict=True)
    for theirs, ours in cast("Iterable[tuple[DecoderLayer, DecoderLayer]]", layers):
        with torch.no_grad():
            h = theirs.input_layernorm(x)
            wanted = theirs.self_attn(h, positions)
            x = theirs(x, positions)
        total = total + (ours.self_attn(h, own) - wanted).square().sum() / wanted.square().sum()
    return total / len(teacher.model.layers)
