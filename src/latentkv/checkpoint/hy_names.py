"""Names of Hy4: the gate and the sinks of its attention, and its hyper-connections.

Its gates are `linear_gate`, as transformers 5.23 writes those of feed-forward blocks, too; `mtp_layers` predict further
tokens, are of another kind and are left out.
"""

from __future__ import annotations

import re

_RENAMED = (
    (re.compile(r"\.hc_pre\.hc_attn_layer\.hc_(fn|base|scale)$"), r".hc_attn_\1"),
    (re.compile(r"\.hc_pre\.hc_mlp_layer\.hc_(fn|base|scale)$"), r".hc_ffn_\1"),
    (re.compile(r"\.hc_pre\.hc_head\.hc_head_(fn|base|scale)$"), r".hc_head.\1"),
    (re.compile(r"\.self_attn\.learnable_sink_param$"), ".self_attn.sinks"),
    (re.compile(r"\.self_attn\.(?:linear_gate|gate_proj)\."), ".self_attn.g_proj."),
    (re.compile(r"\.linear_gate\."), ".gate_proj."),
)
_PUBLISHED = (
    (re.compile(r"\.hc_attn_(fn|base|scale)$"), r".hc_pre.hc_attn_layer.hc_\1"),
    (re.compile(r"\.hc_ffn_(fn|base|scale)$"), r".hc_pre.hc_mlp_layer.hc_\1"),
    (re.compile(r"\.hc_head\.(fn|base|scale)$"), r".hc_pre.hc_head.hc_head_\1"),
    (re.compile(r"\.self_attn\.sinks$"), ".self_attn.learnable_sink_param"),
    (re.compile(r"\.self_attn\.g_proj\."), ".self_attn.linear_gate."),
)
_FURTHER_TOKENS = re.compile(r"\bmtp_layers\.")


def from_hy(name: str) -> str:
    """What a tensor of Hy4 is called by everybody else; others keep their names."""
    for theirs, ours in _RENAMED:
        name = theirs.sub(ours, name)
    return name


def as_hy(name: str) -> str:
    """A tensor's name as Hy4 has it."""
    for ours, theirs in _PUBLISHED:
        name = ours.sub(theirs, name)
    return name


def predicts_further(name: str) -> bool:
    """Whether a tensor belongs to what predicts further tokens, under the name that Hy4 has for it."""
    return _FURTHER_TOKENS.search(name) is not None
