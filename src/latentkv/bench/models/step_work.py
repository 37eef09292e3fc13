"""What one step of a model must read and compute at the least, to be compared with what the machine can do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import prod

from torch import Tensor, nn

from latentkv.models.config import GQAConfig, KDAConfig, LayerConfig, MLAConfig, ModelConfig, RecurrentConfig
from latentkv.models.decoder import Decoder
from latentkv.models.mla import MultiHeadLatentAttention
from latentkv.models.moe import Experts
from latentkv.models.parameters import tensor_groups
from latentkv.weights import PackedWeight
from latentkv.weights.formats import BF16, COMPACT


def weight_bytes_read(decoder: Decoder) -> int:
    """Bytes of weights that decoding one token of one sequence reads: as they are stored, and of its experts alone.

    Zero experts among them have no weights; all are taken to be chosen equally often.
    """
    moe = decoder.config.moe
    unused = {
        id(module.kv_b_proj)
        for module in decoder.model.modules()
        if isinstance(module, MultiHeadLatentAttention) and module.absorb_key is not None
    }
    total = decoder.output_weight.nbytes
    for module in decoder.model.modules():
        if isinstance(module, nn.Embedding) or id(module) in unused:
            continue  # of an embedding one row is read
        stored = sum(weight.nbytes for weight in _own_weights(module))
        if isinstance(module, Experts) and moe is not None:
            stored = stored * moe.experts_per_token // moe.num_choices
        total += stored
    return total


def weight_format(decoder: Decoder) -> str:
    """What most weights of a decoder are stored as: "int4", "uint5", "compact bfloat16", or a dtype."""
    names = {BF16: "bfloat16", COMPACT: "compact bfloat16"}
    counts: Counter[str] = Counter()
    for module in decoder.modules():
        for weight in _own_weights(module):
            if isinstance(weight, PackedWeight):
                counts[names.get(weight.format, weight.format)] += (
                    weight.count * weight.out_features * weight.in_features
                )
            else:
                counts[str(weight.dtype).removeprefix("torch.")] += weight.numel()
    return counts.most_common(1)[0][0]


def _own_weights(module: nn.Module) -> Iterator[Tensor | PackedWeight]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    yield from (value for value in vars(module).values() if isinstance(value, PackedWeight))


def decode_flops(config: ModelConfig, depth: int) -> int:
    """FLOPs of the matrix products of one step after `depth` tokens, latent attention in its absorbed form."""
    attended = sum(_attended(layer, config.num_heads, depth + 1) for layer in config.layers)
    return 2 * (_weights_used(config) + attended)


def prefill_flops(config: ModelConfig, tokens: int) -> int:
    """FLOPs of reading a prompt, latent attention in its expanded form, with the logits of its last token alone."""
    head = config.vocab_size * config.hidden_size
    pairs = config.num_heads * (tokens * (tokens + 1) // 2)
    attended = 0
    for layer in config.layers:
        attention = layer.attention
        recurrent = isinstance(attention, RecurrentConfig)
        attended += _recurrent(attention) * tokens if recurrent else _expanded(attention) * pairs
    return 2 * ((_weights_used(config) - head) * tokens + head + attended)


def _attended(layer: LayerConfig, heads: int, tokens: int) -> int:
    """Products of one query with `tokens` cached ones, of which an indexer selects some."""
    if isinstance(layer.attention, RecurrentConfig):
        return _recurrent(layer.attention)
    indexer, pair = layer.indexer, heads * _absorbed(layer.attention)
    if indexer is None or tokens <= indexer.all_read:
        return pair * tokens
    scored = 0 if layer.shares_selection else indexer.num_heads * indexer.head_dim * (tokens // (indexer.pool or 1))
    return pair * min(indexer.most_read, tokens) + scored


def _recurrent(attention: RecurrentConfig) -> int:
    """Products of a token with a matrix a head: decay, change, what it gives for the query, and in KDA for the key."""
    return (4 if isinstance(attention, KDAConfig) else 3) * attention.num_heads * attention.head_dim**2


def _absorbed(attention: MLAConfig | GQAConfig) -> int:
    """Products of a (query, key) pair of a head."""
    if isinstance(attention, MLAConfig):
        return 2 * attention.kv_lora_rank + attention.qk_rope_head_dim
    return 2 * attention.head_dim


def _expanded(attention: MLAConfig | GQAConfig) -> int:
    """The same, of heads of their own."""
    if isinstance(attention, MLAConfig):
        return attention.qk_nope_head_dim + attention.qk_rope_head_dim + attention.v_head_dim
    return 2 * attention.head_dim


def _weights_used(config: ModelConfig) -> int:
    """Numbers of the matrices that a token is multiplied with."""
    return round(
        sum(
            prod(group.shape) * group.used
            for group in tensor_groups(config)
            if len(group.shape) > 1 or (group.kind == "embedding" and config.tie_word_embeddings)
        )
    )
