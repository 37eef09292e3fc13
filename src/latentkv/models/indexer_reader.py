"""What config.json says of an indexer: its sizes, and which layers share what it selects."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from latentkv.errors import ConfigError
from latentkv.models.config import IndexerConfig, MLAConfig, RopeConfig
from latentkv.models.fields import names_layers
from latentkv.state.spec import PAGE_SIZE

if TYPE_CHECKING:
    from latentkv.models.config_reader import Fields
    from latentkv.models.families import Family

_INDEXER_LETTERS = {"F": "full", "S": "shared"}


def read_indexer(fields: Fields, family: Family, attention: MLAConfig, rope: RopeConfig) -> IndexerConfig | None:
    """The indexer of the layers that have one; None: every token reads all that it sees.

    Raises:
        ConfigError: a field is missing, out of range or not supported.
    """
    if fields.get("index_topk") is None:
        return None
    head_dim = fields.size("index_head_dim")
    if attention.q_lora_rank is None:
        raise ConfigError("config.json: index_topk needs a q_lora_rank, from whose latent the indexer's queries come.")
    if head_dim < attention.qk_rope_head_dim:
        raise ConfigError(
            f"config.json: index_head_dim={head_dim} has no room for qk_rope_head_dim={attention.qk_rope_head_dim} "
            "rotary dimensions."
        )
    if not family.rotates and attention.qk_rope_head_dim:
        raise ConfigError(
            f"config.json: qk_rope_head_dim={attention.qk_rope_head_dim} is not supported beside an indexer that "
            "rotates nothing; only 0 is."
        )
    topk = fields.size("index_topk")
    pool = None if fields.get("index_kpool") is None else fields.size("index_kpool")
    if pool is not None and (topk % pool or PAGE_SIZE % pool):
        raise ConfigError(
            f"config.json: index_kpool={pool} must divide index_topk={topk}, and the {PAGE_SIZE} tokens of a "
            "cache's page."
        )
    indexer = IndexerConfig(
        num_heads=fields.size("index_n_heads"),
        head_dim=head_dim,
        topk=topk,
        interleaved=fields.flag("indexer_rope_interleave"),
        pool=pool,
        open_pool=pool is None or fields.flag("index_kpool_always_select_tail"),
    )
    if not family.indexer_like_attention:
        return indexer
    stated = fields.get("indexer_rope_interleave") is not None
    return replace(
        indexer,
        interleaved=indexer.interleaved if stated else rope.interleaved,
        rotates_last=True,
        norm_eps=fields.positive("rms_norm_eps", 0.0),
        exact_norm=True,
    )


def sharing_layers(fields: Fields, num_layers: int, *, first_is_full: bool) -> tuple[bool, ...]:
    """Which layers have no indexer, and read what the last one before them has selected (arXiv 2603.12201).

    Args:
        fields: of config.json.
        num_layers: of the model.
        first_is_full: its first layer attends, and so cannot share.

    Raises:
        ConfigError: they cannot be so.
    """
    kinds, key = fields.get("indexer_types"), "indexer_types"
    if kinds is None and (pattern := fields.get("index_topk_pattern")) is not None:
        key = "index_topk_pattern"
        kinds = [_INDEXER_LETTERS.get(letter) for letter in pattern] if isinstance(pattern, str) else pattern
    if kinds is None:
        every, offset = fields.count("index_topk_freq") or 1, fields.count("index_skip_topk_offset")
        kinds = ["shared" if max(i - offset + 1, 0) % every else "full" for i in range(num_layers)]
    if not names_layers(kinds, num_layers, ("full", "shared")) or (first_is_full and kinds[0] == "shared"):
        raise ConfigError(
            f"config.json: {key} must name 'full' or 'shared' for each of {num_layers} layers, the first one 'full'."
        )
    return tuple(kind == "shared" for kind in kinds)
