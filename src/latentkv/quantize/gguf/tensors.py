"""What a GGUF file will hold, tensor by tensor, and how each is made of a checkpoint's: all settled before reading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from latentkv.checkpoint.names import layer_of, tensor_kind, text_model_names
from latentkv.checkpoint.tensors import Tensors
from latentkv.models.config import GQAConfig, MLAConfig, ModelConfig
from latentkv.quantize.gguf.mix import Chosen

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
_CORRECTION = "mlp.gate.e_score_correction_bias"
_KV_B = "self_attn.kv_b_proj.weight"
_PERMUTED = ("attn_q", "attn_k")


@dataclass(frozen=True)
class Source:
    """Rows of a file's tensor, made of one of the checkpoint's.

    Attributes:
        name: in the checkpoint's files.
        published: the name under which it is known.
        part: "gate_proj" or "up_proj" of fused experts, "keys" or "values" of a kv_b_proj; "" : all of it.
        heads: of kv_b_proj; or groups of rows whose halves llama.cpp wants interleaved (0: none).
        nope: dimensions of a head's key without position, of a kv_b_proj.
    """

    name: str
    published: str
    part: str = ""
    heads: int = 0
    nope: int = 0

    def matrices(self, reader: Tensors) -> Iterator[tuple[str, Tensor]]:
        """(published name, [R, D] or [n] in the order of the file), one expert after the other."""
        stored = reader.read(self.name)
        if self.part in ("keys", "values"):
            heads = stored.view(self.heads, -1, stored.shape[-1])
            keys, values = heads[:, : self.nope].transpose(1, 2), heads[:, self.nope :]
            yield "", (keys if self.part == "keys" else values).flatten(0, 1)
        elif stored.ndim == 3:
            stem = self.published.rpartition(".")[0]
            for expert, weight in enumerate(stored):
                chosen = {"gate_proj": 0, "up_proj": 1}.get(self.part)
                leaf = self.part or "down_proj"
                yield f"{stem}.{expert}.{leaf}.weight", weight if chosen is None else weight.chunk(2)[chosen]
        elif self.heads:
            halves = stored.view(self.heads, 2, -1, *stored.shape[1:])
            yield self.published, halves.transpose(1, 2).reshape(stored.shape)
        else:
            yield self.published, stored


@dataclass(frozen=True)
class Planned:
    """One tensor of the file.

    Attributes:
        name: in the file.
        shape: with the contiguous dimension last.
        sources: what its rows are made of, in turn; none: it is made of the config.
        dtype: of the sources.
        bytes_before: of the sources, or its share of them.
        layer, kind: for the report.
        chosen: its type.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    dtype: torch.dtype
    bytes_before: int
    layer: int | None
    kind: str
    chosen: Chosen | None = None

    @cached_property
    def nbytes(self) -> int:
        """Bytes in the file."""
        if self.chosen is None:
            raise RuntimeError("its type is not chosen yet")
        return self.parameters // self.chosen.type.weights * self.chosen.type.nbytes

    @cached_property
    def parameters(self) -> int:
        """How many numbers."""
        return torch.Size(self.shape).numel()

    def typed(self, chosen: Chosen) -> Planned:
        """The same, with its type."""
        return replace(self, chosen=chosen)


def plan_tensors(config: ModelConfig, reader: Tensors, architecture: str) -> list[Planned]:
    """The tensors of a model's file in their order, without types; MTP layers are left out.

    Args:
        config: of the model, which `models.loading.match_weights` has found whole in its files.
        reader: of its files.
        architecture: of the file.
    """
    tied = config.tie_word_embeddings
    names = text_model_names(reader.names, nested=reader.nests_text_model, tied=tied)
    if tied:
        names.pop("lm_head.weight", None)  # a copy of the embedding
    plan = _Plan(config, reader, names, permutes=architecture == "llama")
    return [
        *(plan.whole(name, target) for name, target in _TOP.items() if name in names),
        *(tensor for layer in range(config.num_layers) for tensor in plan.layer(layer)),
    ]


class _Plan:
    def __init__(self, config: ModelConfig, reader: Tensors, names: Mapping[str, str], *, permutes: bool) -> None:
        self._config, self._reader, self._names, self._permutes = config, reader, names, permutes

    def layer(self, index: int) -> Iterator[Planned]:
        prefix, block, attention = f"model.layers.{index}.", f"blk.{index}.", self._config.attention
        for stem, target in _LAYER.items():
            for end in ("weight", "bias"):
                if (name := f"{prefix}{stem}.{end}") in self._names:
                    yield self.whole(name, f"{block}{target}.{end}", heads=self._permuted_heads(target, attention))
        if (name := f"{prefix}{_CORRECTION}") in self._names:
            yield self.whole(name, f"{block}exp_probs_b.bias")
        if (name := f"{prefix}{_KV_B}") in self._names:
            yield from self._kv_b(name, block, attention)
        if moe := self._config.layers[index].moe:
            for leaf, target in _EXPERTS.items():
                yield self._experts(moe.num_experts, f"{prefix}mlp.experts", leaf, f"{block}{target}.weight")

    def whole(self, published: str, target: str, *, heads: int = 0) -> Planned:
        stored = self._names[published]
        return self._planned(target, self._reader.shape(stored), (Source(stored, published, heads=heads),))

    def _permuted_heads(self, target: str, attention: MLAConfig | GQAConfig) -> int:
        """llama.cpp's "llama" rotates neighbours where the published weights rotate halves."""
        if not self._permutes or target not in _PERMUTED or isinstance(attention, MLAConfig):
            return 0
        return self._config.num_heads if target == "attn_q" else attention.num_kv_heads

    def _kv_b(self, published: str, block: str, attention: MLAConfig | GQAConfig) -> Iterator[Planned]:
        heads, stored = self._config.num_heads, self._names[published]
        if not isinstance(attention, MLAConfig):
            raise RuntimeError("only latent attention has a kv_b_proj")
        nope, value, latent = attention.qk_nope_head_dim, attention.v_head_dim, attention.kv_lora_rank
        for part, target, shape in (
            ("keys", "attn_k_b", (heads, latent, nope)),
            ("values", "attn_v_b", (heads, value, latent)),
        ):
            source = Source(stored, published, part, heads, nope)
            yield self._planned(f"{block}{target}.weight", shape, (source,))

    def _experts(self, count: int, stem: str, leaf: str, target: str) -> Planned:
        fused = f"{stem}.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}"
        if fused in self._names:
            stored = self._names[fused]
            _, rows, width = self._reader.shape(stored)
            part = "" if leaf == "down_proj" else leaf
            return self._planned(
                target, (count, rows if not part else rows // 2, width), (Source(stored, fused, part),)
            )
        sources = tuple(
            Source(self._names[name], name) for name in (f"{stem}.{expert}.{leaf}.weight" for expert in range(count))
        )
        return self._planned(target, (count, *self._reader.shape(sources[0].name)), sources)

    def _planned(self, target: str, shape: tuple[int, ...], sources: tuple[Source, ...]) -> Planned:
        numbers = torch.Size(shape).numel()
        held = sum(torch.Size(self._reader.shape(source.name)).numel() for source in sources)
        before = sum(self._reader.nbytes(source.name) for source in sources)
        published = sources[0].published
        return Planned(
            target,
            tuple(shape),
            sources,
            self._reader.dtype(sources[0].name),
            round(before * numbers / max(held, 1)),
            layer_of(published),
            tensor_kind(published),
        )
