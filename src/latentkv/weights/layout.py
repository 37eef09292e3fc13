"""Weights in the order in which kernels read them.

The layout, the same on every machine. A matrix [O, D] is cut into blocks of 32 outputs (the last is padded).
In a block, 32-bit words follow each other: word 0 of its 32 outputs, word 1 of its 32 outputs, and so on. A word holds
consecutive weights of one output:

- bf16: 2 weights, the first in the low half.
- int8, fp8: 4 codes, the first in the low byte.
- uint4, fp4, nl4: 8 codes; from bit 4 i, the low half holds code 2 i and the high half code 2 i + 1.
- uint2: 16 codes; from bit 2 i, the low half holds code 2 i and the high half code 2 i + 1.
- uint5: 5 words hold 32 codes: their lowest 4 bits as four of uint4, then one with the highest bits: bit i of the low
  half is code 2 i's and bit i of the high half code 2 i + 1's.
- int4, int5: the same with 8 or 16 added to each code.
- int6: 3 words hold 16 codes, each plus 32: their lowest 4 bits as two of uint4, then one with the others as uint2.
- compact: a third of 8 bfloat16 weights, see `weights/compact.py`.

Quantised weights have their block's 32 scales before the words of each group, those of uint* then 32 minima. The inner
axis is padded to whole groups and words. Padding is zeros. Among compact weights, nl4 and those of int4, int5 and int6
it stands for other numbers: along D activations are zero there, and outputs beyond O are not written.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from latentkv.checks import require
from latentkv.weights import compact as compact_layout
from latentkv.weights.formats import BF16, CODE_FORMATS, COMPACT, INTEGER_PRODUCTS, CodeFormat
from latentkv.weights.weight import QuantizedWeight, require_quantized

BLOCK_OUTS = 32
"""Outputs whose weights lie together."""

_HUGE_PAGE = 2 << 20
_CHUNK = 1 << 19


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """One or several equal matrices [O, D] as the native kernels read them; made by `pack_weight`.

    Attributes:
        data: 1-D uint8, 64-byte aligned, in this module's layout.
        format: name of what a weight is stored as (`weights/formats`); compact weights are bfloat16, too.
        count: stacked matrices (experts or heads).
        out_features: O.
        in_features: D.
        group: weights along D that share a scale, or exceptions that each block has room for (compact).
        scales: dtype of scales and minima.
        rounds_input: whether activations are rounded to 8 bits for its products (`weights/activations.py`).
    """

    data: Tensor
    format: str
    count: int
    out_features: int
    in_features: int
    group: int
    scales: torch.dtype = torch.bfloat16
    rounds_input: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of `data`."""
        return self.data.numel()

    def matrix(self, index: int) -> PackedWeight:
        """One of the stacked matrices, sharing memory."""
        size = self.nbytes // self.count
        part = self.data[index * size : (index + 1) * size]
        return replace(self, data=part, count=1)

    def rounding_input(self) -> PackedWeight:
        """The same weight with `rounds_input`, where its products are those of integers; else itself."""
        return replace(self, rounds_input=True) if self.format in INTEGER_PRODUCTS else self


def pack_weight(weight: Tensor | QuantizedWeight, *, compact: bool = False) -> PackedWeight:
    """Copy a weight into the order in which kernels read it.

    Args:
        weight: [O, D] or [E, O, D], bfloat16 or float32 (rounded to bfloat16), or quantised.
        compact: keep bfloat16 weights in 12 bits where that saves memory, on a CPU and with the extension.

    Raises:
        OpError: it has another shape or dtype, its codes and scales do not fit together, or its groups are not
            multiples of the weights that are packed together.
    """
    values = weight.codes if isinstance(weight, QuantizedWeight) else weight
    require(
        values.ndim in (2, 3) and values.numel() > 0, f"pack_weight takes [O, D] or [E, O, D], not {list(values.shape)}"
    )
    stacked = values if values.ndim == 3 else values[None]
    if isinstance(weight, QuantizedWeight):
        require_quantized(weight)
        format_ = weight.format.name
        group = min(weight.group, stacked.shape[2])
        whole = least_group(weight.format)
        require(
            group % whole == 0 or group == stacked.shape[2],
            f"pack_weight takes groups of a multiple of {whole} weights, not {group}",
        )
        scales = _beside_words(weight).reshape(*stacked.shape[:2], -1, 1 if weight.minima is None else 2)
        scales_dtype = weight.scales.dtype
    else:
        require(
            weight.dtype in (torch.bfloat16, torch.float32),
            f"pack_weight takes bfloat16 or float32 weights, not {weight.dtype}",
        )
        format_, group, scales, scales_dtype = BF16, 0, None, torch.bfloat16
        if compact and weight.is_cpu and (packed := _pack_compact(stacked.bfloat16().contiguous())) is not None:
            return packed
    count, out_features, in_features = stacked.shape
    layout = _layout(format_, count, out_features, in_features, group, scales_dtype)
    data = _allocate(4 * math.prod(layout))
    words = data.view(torch.int32).view(layout)
    for matrix in range(count):
        _pack_matrix(stacked[matrix], None if scales is None else scales[matrix], format_, group, words[matrix])
    return PackedWeight(data, format_, count, out_features, in_features, group, scales_dtype)


def least_group(form: CodeFormat) -> int:
    """Weights that share a scale at least: groups are multiples of so many, or whole rows."""
    return max(8, form.pack[1])


def require_whole(packed: PackedWeight) -> None:
    """Raise `OpError` unless `data` has the bytes that the other fields promise: kernels read as far as those say."""
    numbers = (packed.count, packed.out_features, packed.in_features)
    require(
        packed.format in (BF16, COMPACT, *CODE_FORMATS)
        and all(0 < number < 2**31 for number in numbers)
        and 0 <= packed.group < 2**31,
        f"{numbers[0]} of [{numbers[1]}, {numbers[2]}] in {packed.format!r}, groups of {packed.group}, are no weight",
    )
    if packed.format == COMPACT:
        words = packed.count * _compact_words(packed.out_features, packed.in_features, packed.group)
    else:
        words = math.prod(_layout(packed.format, *numbers, packed.group, packed.scales))
    require(
        packed.data.dtype == torch.uint8 and packed.data.ndim == 1 and packed.nbytes == 4 * words,
        f"{packed.nbytes:,} bytes are no weight that takes {4 * words:,}",
    )


def unpack_weight(packed: PackedWeight) -> Tensor:
    """What was packed, [O, D] or [E, O, D] float32: exact."""
    if packed.format == COMPACT:
        return _unpack_compact(packed)
    layout = _layout(packed.format, packed.count, packed.out_features, packed.in_features, packed.group, packed.scales)
    stored = packed.data.view(torch.int32).view(layout)
    count, blocks, groups, _ = layout
    scale_words = _scale_words(packed.format, packed.scales)
    words = stored[..., scale_words:].reshape(count, blocks, groups, -1, BLOCK_OUTS).permute(0, 1, 4, 2, 3)
    weight = _weights_of(words.clone(memory_format=torch.contiguous_format), packed.format)
    if scale_words:  # [E, blocks, groups, 32 or twice as many]
        shared = stored[..., :scale_words].contiguous().view(packed.scales).float().transpose(2, 3)[..., None]
        weight *= shared[:, :, :BLOCK_OUTS]
        if shared.shape[2] > BLOCK_OUTS:
            weight += shared[:, :, BLOCK_OUTS:]
    group = packed.group or packed.in_features
    weight = weight[..., :group].reshape(count, blocks * BLOCK_OUTS, -1)
    weight = weight[:, : packed.out_features, : packed.in_features]
    return weight[0] if count == 1 else weight


def _pack_compact(weight: Tensor) -> PackedWeight | None:
    """[E, O, D] bfloat16 in 12 bits a weight; None where that saves nothing."""
    windows = compact_layout.find_windows(weight, BLOCK_OUTS)
    if windows is None:
        return None
    firsts, exceptions = windows
    count, out_features, in_features = weight.shape
    size = 4 * count * _compact_words(out_features, in_features, exceptions)
    if size >= 4 * math.prod(_layout(BF16, count, out_features, in_features, 0)):
        return None
    data = _allocate(size)
    words = data.view(torch.int32).view(count, -1)
    for matrix, first, target in zip(weight, firsts, words, strict=True):
        compact_layout.pack_matrix(matrix, first, exceptions, BLOCK_OUTS, target)
    return PackedWeight(data, COMPACT, count, out_features, in_features, exceptions)


def _compact_words(out_features: int, in_features: int, exceptions: int) -> int:
    """32-bit words of a compact matrix."""
    words = compact_layout.eights(in_features) * compact_layout.WORDS * BLOCK_OUTS
    return -(-out_features // BLOCK_OUTS) * (words + compact_layout.end_words(exceptions))


def _unpack_compact(packed: PackedWeight) -> Tensor:
    words = packed.data.view(torch.int32).view(packed.count, -(-packed.out_features // BLOCK_OUTS), -1)
    weight = torch.stack([compact_layout.unpack_matrix(matrix, BLOCK_OUTS, packed.in_features) for matrix in words])
    weight = weight[:, : packed.out_features].float()
    return weight[0] if packed.count == 1 else weight


def _beside_words(weight: QuantizedWeight) -> Tensor:
    """[..., O, groups, 1 or 2] scales, and minima where there are some."""
    return torch.stack([weight.scales] if weight.minima is None else [weight.scales, weight.minima], dim=-1)


def _scale_words(format_: str, scales: torch.dtype) -> int:
    if format_ not in CODE_FORMATS:
        return 0
    return BLOCK_OUTS * scales.itemsize * (2 if CODE_FORMATS[format_].has_minima else 1) // 4


def _layout(
    format_: str,
    count: int,
    out_features: int,
    in_features: int,
    group: int,
    scales: torch.dtype = torch.bfloat16,
) -> tuple[int, ...]:
    """Matrices, blocks, groups, and 32-bit words of a group in a block."""
    group = group or in_features
    words, weights = CODE_FORMATS[format_].pack if format_ in CODE_FORMATS else (1, 2)
    group_words = -(-group // weights) * words
    blocks, groups = -(-out_features // BLOCK_OUTS), -(-in_features // group)
    return count, blocks, groups, _scale_words(format_, scales) + group_words * BLOCK_OUTS


def _allocate(size: int) -> Tensor:
    """Zeroed bytes, in huge pages where the system has them: a stream then crosses few pages."""
    if size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has no huge pages
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _pack_matrix(values: Tensor, scales: Tensor | None, format_: str, group: int, target: Tensor) -> None:
    """Pack values [O, D] and scales [O, groups, 1 or 2] into target [blocks, groups, words]."""
    groups = target.shape[1]
    scale_words = 0 if scales is None else _scale_words(format_, scales.dtype)
    group = group or values.shape[1]
    # A few blocks at a time: the temporaries stay in the processor's cache.
    blocks_at_a_time = max(1, _CHUNK // (BLOCK_OUTS * values.shape[1]))
    chunks = zip(values.split(blocks_at_a_time * BLOCK_OUTS), target.split(blocks_at_a_time), strict=True)
    for rows, blocks in chunks:
        rows = functional.pad(rows, (0, groups * group - rows.shape[1], 0, len(blocks) * BLOCK_OUTS - len(rows)))
        stored = blocks[..., scale_words:].unflatten(2, (-1, BLOCK_OUTS))  # [blocks, groups, words, 32]
        words = _words_of(rows.view(-1, groups, group), format_, stored.shape[2])
        stored.copy_(words.view(len(blocks), BLOCK_OUTS, groups, -1).permute(0, 2, 3, 1))
    if scales is not None:
        kinds = scales.shape[2]
        scales = functional.pad(scales, (0, 0, 0, 0, 0, len(target) * BLOCK_OUTS - len(scales)))
        stored = target[..., :scale_words].view(scales.dtype).unflatten(2, (kinds, BLOCK_OUTS))
        stored.copy_(scales.view(len(target), BLOCK_OUTS, groups, kinds).permute(0, 2, 3, 1))


def _words_of(weights: Tensor, format_: str, count: int) -> Tensor:
    """[..., group] weights or codes to [..., count] int32, padded with zeros."""
    form = CODE_FORMATS.get(format_)
    words, packed_together = form.pack if form else (1, 2)
    weights = functional.pad(weights, (0, count // words * packed_together - weights.shape[-1]))
    return form.words_of(weights) if form else weights.bfloat16().view(torch.int32)


def _weights_of(words: Tensor, format_: str) -> Tensor:
    """[..., words] to [..., weights] float32, before they are scaled."""
    form = CODE_FORMATS.get(format_)
    return form.values(form.codes_of(words)) if form else words.view(torch.bfloat16).float()
