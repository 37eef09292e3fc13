"""The linearised norms of a converted model, taken out while it is trained: their weights have no scale to train on."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from latentkv.convert.export import NORM_EXPONENT
from latentkv.errors import TrainingError
from latentkv.models.decoder import Decoder
from latentkv.models.mla import MultiHeadLatentAttention
from latentkv.train.ranks import own_rows


@contextmanager
def without_norms(student: Decoder) -> Generator[None]:
    """Let the projections before the norms do what those multiply by, and put the norms back in the end.

    Raises:
        TrainingError: a norm is not one that a conversion wrote.
    """
    taken: list[tuple[Any, str, nn.Module]] = []
    layers = [module for module in student.modules() if isinstance(module, MultiHeadLatentAttention)]
    for attention in layers:
        parts = [("kv_a_proj_with_mqa", "kv_a_layernorm", attention.config.kv_lora_rank)]
        if attention.config.q_lora_rank is not None:
            parts.append(("q_a_proj", "q_a_layernorm", attention.config.q_lora_rank))
        for projection, norm, rank in parts:
            _scale(getattr(attention, projection), rank, _gain(getattr(attention, norm)))
            taken.append((attention, norm, getattr(attention, norm)))
            setattr(attention, norm, nn.Identity())
    try:
        yield
    finally:
        for attention, norm, module in taken:
            setattr(attention, norm, module)
            projection, rank = (
                (attention.kv_a_proj_with_mqa, attention.config.kv_lora_rank)
                if norm == "kv_a_layernorm"
                else (attention.q_a_proj, attention.config.q_lora_rank)
            )
            _scale(projection, rank, 1 / _gain(module))


def _gain(norm: Any) -> float:
    """What a linearised norm multiplies by."""
    weight = norm.weight
    if not bool((weight == 2.0**NORM_EXPONENT).all()):
        raise TrainingError("This model's latent norms are not those of a conversion: train it with `latentkv train`.")
    return 2.0**NORM_EXPONENT / math.sqrt(norm.eps)


@torch.no_grad()
def _scale(projection: nn.Linear, rank: int, factor: float) -> None:
    """The first `rank` rows, of which this process may have some."""
    for parameter in projection.parameters():
        rows, first = own_rows(parameter)
        rows[: max(rank - first, 0)] *= factor
