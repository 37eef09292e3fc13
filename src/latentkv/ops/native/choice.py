"""The choice of tokens on `csrc/choice.cpp`; None where torch is to compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from latentkv.kernels import extension
from latentkv.ops.native.eligible import isa_for

if TYPE_CHECKING:
    from latentkv.ops.choice import ChoiceRule

_RULE = np.dtype(
    [("temperature", "f8"), ("top_k", "i8"), ("top_p", "f8"), ("min_p", "f8"), ("seed", "u8"), ("position", "u8")]
)
"""As `csrc/choice.h` lays it out."""


def choose_tokens(logits: Tensor, rules: Sequence[ChoiceRule]) -> list[int] | None:
    """See `choice.choose_tokens`."""
    if isa_for(logits) is None or not logits.is_contiguous():
        return None
    rows, vocabulary = logits.shape
    laid_out = np.array(
        [
            (rule.temperature, min(rule.top_k, vocabulary), rule.top_p, rule.min_p, rule.seed, rule.position)
            for rule in rules
        ],
        _RULE,
    )
    tokens = torch.empty(rows, dtype=torch.int64)
    extension.choose_tokens(logits.data_ptr(), rows, vocabulary, laid_out.ctypes.data, tokens.data_ptr())
    return tokens.tolist()
