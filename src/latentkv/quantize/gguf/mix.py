"""Which of GGUF's types each tensor gets: the one rule, after llama.cpp's mixes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from latentkv.checks import require
from latentkv.weights.gguf.encoding import WRITTEN
from latentkv.weights.gguf.types import TensorType

# What a file says that most of its tensors are (llama.h, enum llama_ftype).
_FILE_TYPES: Mapping[str, int] = {
    **{"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_k": 15, "q6_k": 18, "mxfp4": 38},
}
GGUF_TYPES = tuple(_FILE_TYPES)
"""What can be asked for."""

_PLAIN = ("f32", "f16", "bf16")
_STORED: Mapping[torch.dtype, str] = {torch.float32: "F32", torch.float16: "F16"}
_ENDS = ("token_embd", "output")
# Everything that is cached passes through these, and they are small beside the rest.
_LATENT = ("attn_q_a", "attn_kv_a_mqa", "attn_k_b", "attn_v_b", "attn_kv_b")
_ROUTER = ("ffn_gate_inp", "exp_probs_b")
# Of these llama.cpp's Q4_K_M keeps more bits, in the layers that `_keeps_more` says.
_SENSITIVE = ("attn_v", "ffn_down", "ffn_down_exps", "ffn_down_shexp")
_FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class Chosen:
    """A tensor's type.

    Attributes:
        type: that it is stored in.
        instead_of: the type that its width does not allow; None: it is the one that was meant.
    """

    type: TensorType
    instead_of: str | None = None


def require_gguf_type(name: str) -> None:
    """Raise `OpError` unless files are written in this type."""
    require(name in GGUF_TYPES, f"unknown type {name!r} for GGUF; choose one of {', '.join(GGUF_TYPES)}")


def file_type(asked: str) -> int:
    """The number of a mix in `general.file_type`."""
    return _FILE_TYPES[asked]


def choose_type(name: str, shape: tuple[int, ...], asked: str, stored: torch.dtype, num_layers: int) -> Chosen:
    """The type of one tensor.

    Vectors and the router are float32. Embedding and output head get Q6_K, or Q8_0 where that or MXFP4 is asked for;
    the projections to and from the latents Q8_0. Of Q4_K's files, half of the values' and the feed-forwards' last
    projections get Q6_K, as in llama.cpp's Q4_K_M. What 256 does not divide gets Q5_0 for Q4_K and Q8_0 for Q6_K, as
    there; what 32 does not divide stays as it is stored.

    Args:
        name: in the file.
        shape: with the contiguous dimension last.
        asked: one of `GGUF_TYPES`.
        stored: dtype of the source.
        num_layers: of the model.
    """
    block, _, leaf = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")
    if len(shape) == 1 or leaf in _ROUTER:
        return Chosen(WRITTEN["F32"])
    if asked in _PLAIN:
        return Chosen(WRITTEN[asked.upper()])
    wanted = asked.upper()
    if leaf in _ENDS:
        wanted = "Q8_0" if asked in ("q8_0", "mxfp4") else "Q6_K"
    elif leaf in _LATENT:
        wanted = "Q8_0"
    elif asked == "q4_k" and leaf in _SENSITIVE and _keeps_more(int(block.removeprefix("blk.")), num_layers):
        wanted = "Q6_K"
    meant = wanted
    if shape[-1] % WRITTEN[wanted].weights:
        wanted = _FALLBACK.get(wanted, wanted)
    if shape[-1] % WRITTEN[wanted].weights:
        wanted = _STORED.get(stored, "BF16")
    return Chosen(WRITTEN[wanted], None if wanted == meant else meant)


def _keeps_more(layer: int, num_layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
