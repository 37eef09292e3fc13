"""Fill a decoder's tensors from a checkpoint: all names and shapes are settled before the first weight is read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from latentkv.checkpoint.cuts import Cut
from latentkv.checkpoint.layouts import foreign_names
from latentkv.checkpoint.names import layer_of, mtp_index, published_parts, text_model_names
from latentkv.checkpoint.tensors import Tensors
from latentkv.errors import CheckpointError
from latentkv.weights.weight import QuantizedWeight

_NAMED_AT_MOST = 3
# Published MTP layers repeat the embedding and the output head, which they share with the model.
_SHARED_BY_MTP = (".embed_tokens.weight", ".shared_head.head.weight")
_OF_INDEXER = ".self_attn.indexer."
_RATES = ".A_log"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Match:
    """Which tensors of a checkpoint belong to which tensors of a decoder, every name and shape settled.

    Attributes:
        mtp_modules: the k of every `mtp.{k}` that the checkpoint holds; drop the others.
        cuts: what the decoder has of tensors that it has a part of.
    """

    def __init__(
        self,
        reader: Tensors,
        parts: Mapping[str, tuple[str, ...]],
        sources: Mapping[str, str],
        num_layers: int,
        mtp_modules: frozenset[int],
    ) -> None:
        self.mtp_modules = mtp_modules
        self._reader = reader
        self._parts = parts
        self._sources = sources
        self._order = {source: index for index, source in enumerate(reader.names)}
        self._num_layers = num_layers
        self.cuts: Mapping[str, Cut] = {}
        self._zeros: frozenset[str] = frozenset()

    def cut(self, cuts: Mapping[str, Cut], zeros: Iterable[str] = ()) -> Match:
        """The same for a decoder that has parts of some of the tensors.

        Args:
            cuts: what it has of which; a part of the embedding may be called `lm_head.weight`, if it has no other.
            zeros: those that are zero here, whatever the checkpoint has.
        """
        parts, sources = dict(self._parts), dict(self._sources)
        if _HEAD in cuts and _HEAD not in parts:
            parts[_HEAD], sources[_HEAD] = (_HEAD,), sources[_EMBEDDING]
        match = Match(self._reader, parts, sources, self._num_layers, self.mtp_modules)
        match.cuts, match._zeros = cuts, frozenset(zeros)
        return match

    @torch.no_grad()
    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Copy the checkpoint into some of the decoder's allocated tensors, one at a time, cast to their dtype.

        Args:
            state: tensors by their names in the decoder. Those that the checkpoint may lack and lacks become zero.

        Raises:
            CheckpointError: a tensor cannot be read.
        """
        targets = {part: (name, view) for name, tensor in state.items() for part, view in self._views(name, tensor)}
        for part in sorted(targets, key=lambda part: self._order.get(self._sources.get(part, ""), -1)):
            name, target = targets[part]
            if part not in self._sources or name in self._zeros:
                target.zero_()
                continue
            source, cut = self._sources[part], self.cuts.get(name)
            # What is cut is cast afterwards: of a mapped file only the part is read then.
            whole = cut is None or self._reader.is_quantized(source)
            stored = self._reader.read(source, dtype=target.dtype if whole else None)
            if part.endswith(_RATES):
                stored, target = stored.flatten(), target.flatten()
            if cut is not None:
                stored = cut.of_stored(stored, target, state[name])
            target.copy_(stored)

    def quantized(self, state: Mapping[str, Tensor]) -> dict[str, QuantizedWeight]:
        """Those of some of the decoder's tensors that the checkpoint holds quantised, as they are stored.

        Where the parts of one are quantised in different ways, it is none of them.

        Args:
            state: tensors by their names in the decoder; only their shapes matter.

        Raises:
            CheckpointError: a tensor cannot be read.
        """

        def stored(source: str, cut: Cut | None) -> QuantizedWeight | None:
            weight = self._reader.quantized(source)
            return weight if weight is None or cut is None else cut.of_quantized(weight)

        joined = {name: self._join(name, tensor, stored) for name, tensor in state.items()}
        return {name: weight for name, weight in joined.items() if weight is not None}

    def rounded(
        self, name: str, tensor: Tensor, quantize: Callable[[Tensor], QuantizedWeight]
    ) -> QuantizedWeight | None:
        """One of the decoder's tensors, of which it has a part: that part of the whole, quantised.

        Args:
            name: in the decoder.
            tensor: only its shape matters, and the dtype that is quantised.
            quantize: [O, D] or [E, O, D], each row by itself.

        Raises:
            CheckpointError: a tensor cannot be read.
            OpError: its parts are too small for groups of weights.
        """

        def made(source: str, cut: Cut | None) -> QuantizedWeight | None:
            whole = self._reader.read(source, dtype=tensor.dtype)
            if cut is None or cut.axis == -2:  # rows are quantised each by itself
                return quantize(whole if cut is None else cut.of(whole))
            return cut.of_quantized(quantize(whole))

        return self._join(name, tensor, made)

    def _join(
        self, name: str, tensor: Tensor, given_by: Callable[[str, Cut | None], QuantizedWeight | None]
    ) -> QuantizedWeight | None:
        """One of the decoder's tensors, of what is given for each of its parts; None: of one nothing, or not alike.

        Args:
            name: in the decoder.
            tensor: only its shape matters.
            given_by: what gives the part of a tensor of the checkpoint.
        """
        joined: QuantizedWeight | None = None
        views: list[dict[str, Tensor]] = []
        cut = self.cuts.get(name)
        if cut is not None and len(self._parts[name]) > 1:
            cut = replace(cut, pieces=1)  # each of which is a tensor of the checkpoint
        for part in self._parts[name]:
            given = given_by(self._sources[part], cut) if part in self._sources else None
            if given is None or (joined is not None and not given.is_like(joined)):
                return None
            if joined is None:
                shared = (*tensor.shape[:-1], given.scales.shape[-1])
                joined = replace(
                    given,
                    codes=torch.empty(tensor.shape, dtype=torch.int8),
                    scales=given.scales.new_empty(shared),
                    minima=None if given.minima is None else given.scales.new_empty(shared),
                )
                views = [dict(self._views(name, numbers)) for numbers in _numbers(joined)]
            for view, numbers in zip(views, _numbers(given), strict=True):
                view[part].copy_(numbers)
        return joined

    def _views(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's names for a tensor of the decoder, each with its view of `tensor`."""
        return published_parts(name, tensor, self._num_layers, fused=self._parts[name])


def _numbers(weight: QuantizedWeight) -> list[Tensor]:
    return [weight.codes, weight.scales] + ([] if weight.minima is None else [weight.minima])


def match_parameters(
    state: Mapping[str, Tensor],
    reader: Tensors,
    *,
    num_layers: int,
    num_mtp_layers: int = 0,
    zero_if_absent: Collection[str] = (),
) -> Match:
    """Find every tensor of a decoder in a checkpoint; nothing is read yet.

    Args:
        state: the decoder's `state_dict()` (meta tensors will do): experts fused, MTP layers as `mtp.{k}.*`, no
            `lm_head.weight` where tied.
        reader: the checkpoint; its experts may be fused or one by one.
        num_layers: of the decoder, MTP layers not counted.
        num_mtp_layers: how many MTP layers the config counts; one that the checkpoint lacks altogether is no error.
        zero_if_absent: ends of names which, when absent, are filled with zeros (`e_score_correction_bias` of A.X-K1).

    Raises:
        CheckpointError: tensors are missing, unexpected, of another shape or not floating point, each named.
    """
    found = text_model_names(reader.names, nested=reader.nests_text_model, tied="lm_head.weight" not in state)
    mtp_layers = _mtp_layers(found, num_layers, num_mtp_layers)
    filled = frozenset(k for name in state if (k := mtp_index(name)) is not None and num_layers + k in mtp_layers)
    targets: dict[str, Tensor] = {}
    parts: dict[str, tuple[str, ...]] = {}
    for name, tensor in state.items():
        if (k := mtp_index(name)) is None or k in filled:
            views = dict(published_parts(name, tensor, num_layers, found))
            targets.update(views)
            parts[name] = tuple(views)

    absent = [name for name in targets if name not in found]
    zeroed = [name for name in absent if name.endswith(tuple(zero_if_absent))]
    missing = sorted(set(absent) - set(zeroed))
    redundant = _redundant_names(found, targets, mtp_layers)
    redundant |= {name for name, source in found.items() if 0 in reader.shape(source)}  # shared experts without width
    extra = [source for name, source in found.items() if name not in targets and name not in redundant]
    if (missing or extra) and (reason := foreign_names(reader.folder, reader.names)):
        raise CheckpointError(reason)
    _refuse_missing(missing, targets, reader)
    _refuse_unexpected(extra, reader)
    sources = {name: source for name, source in found.items() if name in targets}
    _refuse_misshapen(sources, targets, reader)
    _refuse_untied_head(found, targets, reader)
    return Match(reader, parts, sources, num_layers, filled)


def _mtp_layers(found: Iterable[str], num_layers: int, num_mtp_layers: int) -> set[int]:
    """Layers of the checkpoint that predict further tokens: those the config counts, or that have an eh_proj."""
    layers: set[int] = set()
    for name in found:
        layer = layer_of(name)
        if layer is None or layer < num_layers:
            continue
        if layer < num_layers + num_mtp_layers or ".eh_proj." in name:
            layers.add(layer)
    return layers


def _redundant_names(found: Iterable[str], targets: Mapping[str, Tensor], mtp_layers: set[int]) -> set[str]:
    """Tensors that published checkpoints carry although the decoder, which lacks them, has no use for them."""
    filled_layers = {layer_of(name) for name in targets}
    has_post_norm = any(".post_mlp_layernorm." in name for name in targets)
    indexed = {layer_of(name) for name in targets if _OF_INDEXER in name}
    redundant = {"lm_head.weight"}  # a copy of the embedding that it is tied to
    for name in found:
        layer = layer_of(name)
        unused_by_mtp = layer in mtp_layers and (layer not in filled_layers or name.endswith(_SHARED_BY_MTP))
        of_dense_layer = has_post_norm and name.endswith(".post_mlp_layernorm.weight")
        of_sharing_layer = bool(indexed) and layer not in indexed and _OF_INDEXER in name
        if unused_by_mtp or of_dense_layer or of_sharing_layer:
            redundant.add(name)
    return redundant


def _refuse_missing(missing: list[str], targets: Mapping[str, Tensor], reader: Tensors) -> None:
    if missing:
        shapes = _listed(f"{name} {list(targets[name].shape)}" for name in missing)
        if missing in (["lm_head.weight"], ["model.embed_tokens.weight"]):
            raise CheckpointError(
                f"{reader.folder} lacks {shapes}, and config.json does not tie output head and embedding: set "
                "tie_word_embeddings to true there if they are one, or else download the weights again"
            )
        raise CheckpointError(
            f"{reader.folder} lacks {shapes}: the download is incomplete, or config.json belongs to another checkpoint"
        )


def _refuse_unexpected(unexpected: list[str], reader: Tensors) -> None:
    if unexpected:
        shapes = _listed(f"{name} {list(reader.shape(name))}" for name in unexpected)
        raise CheckpointError(
            f"{reader.folder} holds {shapes}, which its config.json has no place for: "
            "the config belongs to another checkpoint, or the architecture is not supported"
        )


def _refuse_misshapen(sources: Mapping[str, str], targets: Mapping[str, Tensor], reader: Tensors) -> None:
    wrong: list[str] = []
    for name, source in sources.items():
        if _without_ones(name, reader.shape(source)) != _without_ones(name, targets[name].shape):
            wrong.append(f"{source} (expected {list(targets[name].shape)}, found {list(reader.shape(source))})")
        elif reason := reader.why_unreadable(source):
            wrong.append(reason)
    if wrong:
        raise CheckpointError(f"{reader.folder} does not fit its config.json: {_listed(wrong)}")


def _without_ones(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """A shape; that of a recurrence's rates, a number a head, which checkpoints have as [H] and as [1, 1, H, 1]."""
    return tuple(size for size in shape if size > 1) if name.endswith(_RATES) else tuple(shape)


def _refuse_untied_head(found: Mapping[str, str], targets: Mapping[str, Tensor], reader: Tensors) -> None:
    """A head that is tied to the embedding may be stored too, but only as a copy of it."""
    head, embedding = found.get("lm_head.weight"), found.get("model.embed_tokens.weight")
    if head is None or embedding is None or "lm_head.weight" in targets:
        return
    if not torch.equal(reader.read(head), reader.read(embedding)):
        raise CheckpointError(
            f"{reader.folder}: {head} differs from {embedding}, but config.json ties them: "
            "set tie_word_embeddings to false there"
        )


def _listed(items: Iterable[str]) -> str:
    """The first few items, and how many more."""
    items = list(items)
    more = len(items) - _NAMED_AT_MOST
    return ", ".join(items[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
