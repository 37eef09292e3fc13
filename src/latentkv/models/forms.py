"""The two forms of latent attention: the same function, at different costs."""

from __future__ import annotations

from typing import Literal

from latentkv.models.config import MLAConfig

Form = Literal["absorbed", "expanded"]


def choose_form(config: MLAConfig, new_tokens: int, kv_len: int) -> Form:
    """The cheaper form, in FLOPs a head, of attending `new_tokens` queries (the last of `kv_len` cached tokens).

    expanded: 2 (Dn + R + Dv) a (query, key) pair + 2 L (Dn + Dv) a context token;
    absorbed: 2 (2 L + R) a pair + 2 L (Dn + Dv) a query token.
    """
    pairs = new_tokens * (kv_len - new_tokens) + new_tokens * (new_tokens + 1) // 2
    heads = config.qk_nope_head_dim + config.v_head_dim
    projection = 2 * config.kv_lora_rank * heads
    expanded = 2 * (heads + config.qk_rope_head_dim) * pairs + projection * kv_len
    absorbed = 2 * (2 * config.kv_lora_rank + config.qk_rope_head_dim) * pairs + projection * new_tokens
    return "absorbed" if absorbed <= expanded else "expanded"
