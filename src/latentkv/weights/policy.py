"""Which weights of a model are quantised, and how: the one rule for files and for quantising while loading."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from latentkv.weights.formats import INT8, CodeFormat
from latentkv.weights.weight import GROUP_SIZES

# Linear layers that are read whole for every token, and whose errors average out. Everything else stays as it is:
# embeddings, norms, routers and their biases, the weights of an indexer's heads, the sinks of softmaxes, what pools of
# index keys and residual streams are mixed by (index_kpool_compress_*, hc_*), what recurrences forget and write by
# (b_proj, A_log, dt_bias, the taps of convolutions), and the projections to and from the latents (kv_a_proj_with_mqa,
# kv_b_proj, q_a_proj), of gates of low rank (f_a_proj, f_b_proj, g_a_proj, g_b_proj) and of the multi-token-prediction
# input (eh_proj), through which all information passes.
_QUANTISED = re.compile(
    r"model\.layers\.\d+\."
    r"(self_attn\.(q_proj|q_b_proj|k_proj|v_proj|query_key_value|f_proj|g_proj|o_proj|indexer\.(wq_b|wk))\.weight"
    r"|mlp\.((experts\.\d+|shared_experts?)\.)?(gate_proj|up_proj|down_proj)\.weight"
    r"|mlp\.experts\.(gate_up_proj|down_proj))"
)
# A gate of latent attention has few rows, a number for each head: nothing is saved by rounding it.
_GATE, _MOST_HEADS = re.compile(r"model\.layers\.\d+\.self_attn\.g_proj\.weight"), 256
# Errors of the output head shift tokens' probabilities directly, so it never gets fewer than 8 bits.
_HEAD = re.compile(r"lm_head\.weight|model\.layers\.\d+\.shared_head\.head\.weight")


@dataclass(frozen=True)
class WeightScheme:
    """How one weight is quantised.

    Attributes:
        format: of its codes.
        group: inputs that share a scale; None: a whole row does.
        symmetric: code 0 stands for 0; else files have zero points.
        rows: outputs that share it, too; None: all do.
    """

    format: CodeFormat
    group: int | None
    symmetric: bool = True
    rows: int | None = 1


def choose_scheme(
    published: str, shape: Sequence[int], fmt: CodeFormat, group: int | None = None
) -> WeightScheme | None:
    """How a weight is to be quantised, or None where it stays in high precision.

    Args:
        published: its name in a checkpoint (see `checkpoint.names`), experts one by one or fused.
        shape: [..., O, D].
        fmt: what is asked for the model's weights. The output head gets int8 either way.
        group: asked group; None: the format's own default. Where D is no multiple of it, the largest smaller group that
            divides D is taken, else int8 by whole rows: other engines take no partial groups.
    """
    if _HEAD.fullmatch(published):
        return WeightScheme(INT8, group if fmt == INT8 and group and shape[-1] % group == 0 else None)
    if not _QUANTISED.fullmatch(published) or (_GATE.fullmatch(published) and shape[-2] <= _MOST_HEADS):
        return None
    group = group or fmt.default_group
    for size in sorted(GROUP_SIZES, reverse=True):
        if group and size <= group and shape[-1] % size == 0:
            return WeightScheme(fmt, size)
    return WeightScheme(INT8, None)
