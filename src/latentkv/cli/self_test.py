"""Each op once against its float64 reference, small: does what this machine runs compute what it should?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from latentkv import ops
from latentkv.ops import reference
from latentkv.ops.backends import describe_backends, why_not_native
from latentkv.weights import pack_weight
from latentkv.weights.formats import BF16, CODE_FORMATS, COMPACT
from latentkv.weights.rounding import round_plainly

Case = Callable[[torch.device, torch.dtype, torch.Generator], tuple[Tensor, Tensor]]
TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-5, torch.bfloat16: 2.01 / 128}

_LATENT, _ROPE, _HEADS, _PAGE = 64, 16, 3, 8
# Two sequences with a past: 3 and 1 new tokens at the ends of 13 and 6 cached ones, on pages out of order.
_Q_START, _STOP = torch.tensor([0, 3, 4], dtype=torch.int32), torch.tensor([11, 12, 13, 6], dtype=torch.int32)
_TABLE = torch.tensor([[3, 1], [2, 2_147_480_000]], dtype=torch.int32)


@dataclass(frozen=True)
class OpReport:
    """One op in one dtype: what computes it, and its largest error in units of the largest right value."""

    op: str
    device: str
    dtype: str
    backend: str
    error: float
    tolerance: float
    passed: bool


def self_test(device: torch.device) -> list[OpReport]:
    """Run every op on `device` in float32 and bfloat16, those on packed weights where the native kernels run."""
    cases = {**_CASES, **(_PACKED_CASES if why_not_native(device) is None else {})}
    return [_run(op, case, device, dtype) for op, case in cases.items() for dtype in TOLERANCE]


def _run(op: str, case: Case, device: torch.device, dtype: torch.dtype) -> OpReport:
    got, wanted = case(device, dtype, torch.Generator().manual_seed(1))
    difference = (got.cpu().double() - wanted).abs().max() / wanted.abs().max()
    error = float(difference.nan_to_num(nan=float("inf")))
    return OpReport(
        op=op,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        backend=describe_backends(device, dtype).get(op, "torch"),
        error=error,
        tolerance=TOLERANCE[dtype],
        passed=error <= TOLERANCE[dtype],
    )


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def _mla_attend(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    q = _random((4, _HEADS, _LATENT + _ROPE), dtype, generator)
    pages = _random((4, _PAGE, _LATENT + _ROPE), dtype, generator)
    got, _ = ops.mla_attend(*(t.to(device) for t in (q, pages, _TABLE, _Q_START, _STOP)), latent_dim=_LATENT, scale=0.1)
    return got, reference.mla_attend(q, pages, _TABLE, _Q_START, _STOP, latent_dim=_LATENT, scale=0.1)[0]


def _select_slots(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    # Of whole numbers all scores are exact, and those chosen the very same.
    q, keys = (_random(shape, dtype, generator).round() for shape in ((4, 20, 16), (4, _PAGE, 16)))
    weights = torch.randn((4, 20), generator=generator).round()
    args = (q, weights, keys, _TABLE, _Q_START, _STOP)
    return ops.select_slots(*(t.to(device) for t in args), topk=5), reference.select_slots(*args, topk=5).double()


def _pooled_keys(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of a page of tokens, in pools of 4."""
    dim, pool = 24, 4
    k, gate = (_random((_PAGE, dim), dtype, generator) for _ in range(2))
    weight, bias = (_random((dim,), dtype, generator) for _ in range(2))
    ape, slots = _random((pool, dim), torch.float32, generator), torch.arange(_PAGE, 2 * _PAGE)
    keys = torch.zeros(2, _PAGE // pool, dim, dtype=dtype, device=device)
    rings = torch.zeros(2, pool, 2 * dim, dtype=dtype, device=device)
    own = [t.to(device) for t in (slots, k, gate, weight, bias, ape)]
    ops.write_pooled_keys(keys, rings, own[0], own[1], own[2], own[3], own[4], 1e-6, own[5])
    none = torch.zeros(_PAGE, 0)
    normed = reference.index_keys(k, weight, bias, 1e-6, none, none, interleaved=False)
    return keys[1], reference.pooled_index_keys(normed, gate, ape)


def _residual_streams(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Read by a block that gives twice what it reads, and written."""
    count, dim = 3, 24
    rows = (2 + count) * count
    streams = _random((4, count, dim), dtype, generator)
    fn, base, scale = (_random(s, torch.float32, generator) * 0.2 for s in ((rows, count * dim), (rows,), (3,)))
    own = streams.to(device)
    mixed_by = fn.to(device), base.to(device), scale.to(device)
    mix = ops.mix_streams(own, *mixed_by, norm_eps=1e-5, eps=1e-6, iterations=5)
    got = ops.expand_streams(own, 2 * ops.collapse_streams(own, mix.pre), mix)
    expected: list[Tensor] = []
    for token in streams:
        pre, post, comb = reference.mix_streams(token, fn, base, scale, norm_eps=1e-5, eps=1e-6, iterations=5)
        expected.append(reference.expand_streams(token, 2 * reference.collapse_streams(token, pre), post, comb))
    return got, torch.stack(expected)


def _independent_streams(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What streams are read by, and written by."""
    count, dim = 3, 24
    streams = _random((4, count, dim), dtype, generator)
    sizes = (2 * count, count * dim), (2 * count,), (2,)
    weights = [_random(size, torch.float32, generator) * 0.2 for size in sizes]
    fixed = {"norm_eps": 1e-5, "eps": 1e-6, "magnitude": 2.0}
    got = ops.gate_streams(streams.to(device), *(t.to(device) for t in weights), **fixed)
    expected = [torch.stack(reference.gate_streams(token, *weights, **fixed)) for token in streams]
    return torch.stack(got, dim=1), torch.stack(expected)


def _sink_heads(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = _random((4, _HEADS, 20), dtype, generator)
    lse, sinks = (_random(size, torch.float32, generator) for size in ((4, _HEADS), (_HEADS,)))
    expected = reference.sink_heads(x, lse, sinks)  # first: a kernel may change x
    return ops.sink_heads(*(t.to(device) for t in (x, lse, sinks))), expected


def _gqa_attend(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    q = _random((4, 2 * _HEADS, 16), dtype, generator)
    pages = _random((4, _PAGE, 2, _HEADS, 16), dtype, generator)
    got, _ = ops.gqa_attend(*(t.to(device) for t in (q, pages, _TABLE, _Q_START, _STOP)), scale=0.2)
    return got, reference.gqa_attend(q, pages, _TABLE, _Q_START, _STOP, scale=0.2)[0]


def _kda_attend(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    tokens, dim = 5, 24
    width = _HEADS * dim
    qkv, gate, beta, output_gate = (_random((tokens, n), dtype, generator) for n in (3 * width, width, _HEADS, width))
    taps, log_rate, gate_bias = (_random(s, torch.float32, generator) for s in ((4, 3 * width), (_HEADS,), (width,)))
    norm = _random((dim,), dtype, generator)
    shapes = (_HEADS, dim, dim), (3, 3 * width), (0, 3 * width), (0, width), (0, _HEADS)
    state = ops.KDAState._make(torch.zeros(1, *shape, device=device) for shape in shapes)
    got = ops.kda_attend(
        qkv.to(device),
        gate.to(device),
        beta.to(device),
        output_gate.to(device),
        ops.KDAWeights(taps.to(device), log_rate.to(device), gate_bias.to(device), norm.to(device), 1e-6, -5.0),
        state,
        q_start=torch.tensor([0, tokens], dtype=torch.int32),
        stop=torch.arange(1, tokens + 1, dtype=torch.int32),
        slot_ids=torch.tensor([0], dtype=torch.int32),
        pending=torch.tensor([0], dtype=torch.int32),
        committed=torch.tensor([tokens], dtype=torch.int32),
    )
    weights = ops.KDAWeights(taps, log_rate, gate_bias, norm, 1e-6, -5.0)
    expected, _ = reference.kda(
        qkv,
        gate,
        beta,
        output_gate,
        **weights._asdict(),
        matrices=torch.zeros(shapes[0]),
        past=torch.zeros(shapes[1]),
    )
    return got, expected


def _lightning_attend(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    tokens, dim = 5, 24
    width = _HEADS * dim
    qkv, gate = (_random((tokens, n), dtype, generator) for n in (3 * width, width))
    angles = 100 * torch.rand(tokens, dim // 4, generator=generator)
    cos, sin = angles.cos(), angles.sin()
    norms = [_random((n,), dtype, generator) for n in (dim, dim, width)]
    log_decay = -torch.rand(_HEADS, generator=generator)
    got = ops.lightning_attend(
        qkv.to(device),
        gate.to(device),
        cos.to(device),
        sin.to(device),
        ops.LightningWeights._make([*(t.to(device) for t in (log_decay, *norms)), 1e-6, _HEADS]),
        ops.LightningState._make(torch.zeros(1, *s, device=device) for s in ((_HEADS, dim, dim), (0, 2, width))),
        q_start=torch.tensor([0, tokens], dtype=torch.int32),
        stop=torch.arange(1, tokens + 1, dtype=torch.int32),
        slot_ids=torch.tensor([0], dtype=torch.int32),
        pending=torch.tensor([0], dtype=torch.int32),
        committed=torch.tensor([tokens], dtype=torch.int32),
    )
    weights = ops.LightningWeights._make([log_decay, *norms, 1e-6, _HEADS])
    matrices = torch.zeros(_HEADS, dim, dim)
    return got, reference.lightning(qkv, gate, cos, sin, **weights._asdict(), matrices=matrices)[0]


def _mla_prefill(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    q, k = _random((4, _HEADS, 24), dtype, generator), _random((19, _HEADS, 24), dtype, generator)
    v, kv_start = _random((19, _HEADS, 16), dtype, generator), torch.tensor([0, 13, 19], dtype=torch.int32)
    got, _ = ops.mla_prefill(*(t.to(device) for t in (q, k, v, _Q_START, kv_start)), scale=0.2)
    return got, reference.mla_prefill(q, k, v, _Q_START, kv_start, scale=0.2)[0]


def _merge_states(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    out_a, out_b = (_random((5, _HEADS, 16), torch.float32, generator) for _ in range(2))
    lse_a, lse_b = (_random((5, _HEADS), torch.float32, generator) for _ in range(2))
    lse_a[0] = float("-inf")
    got, _ = ops.merge_states(*(t.to(device) for t in (out_a, lse_a, out_b, lse_b)))
    return got, reference.merge_states(out_a, lse_a, out_b, lse_b)[0]


def _moe_experts(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, weights = _random((6, 32), dtype, generator), torch.rand(6, 2, generator=generator)
    ids = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(6)])
    gate_up, down = _random((4, 48, 32), dtype, generator) / 6, _random((4, 32, 24), dtype, generator) / 5
    got = ops.moe_experts(*(t.to(device) for t in (x, ids, weights, gate_up, down)), num_zero_experts=2)
    return got, reference.moe_experts(x, ids, weights, gate_up, down)


def _linear(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, weight = _random((5, 96), dtype, generator), _random((40, 96), dtype, generator)
    return ops.linear(x.to(device), weight.to(device)), x.double() @ weight.double().T


def _packed_linear(fmt: str) -> Case:
    """Against the numbers that the packed codes and scales stand for."""

    def case(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, weight = _random((5, 96), dtype, generator), _random((40, 96), torch.bfloat16, generator)
        stored = round_plainly(weight, CODE_FORMATS[fmt], 32) if fmt in CODE_FORMATS else weight
        exact = stored.double() if isinstance(stored, Tensor) else stored.dequantize(torch.float64)
        return ops.linear(x, pack_weight(stored, compact=fmt == COMPACT)), x.double() @ exact.T

    return case


def _packed_moe_experts(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, weights = _random((6, 32), dtype, generator), torch.rand(6, 2, generator=generator)
    ids = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(6)])
    gate_up = _random((4, 48, 32), torch.bfloat16, generator) / 6
    down = _random((4, 32, 24), torch.bfloat16, generator) / 5
    got = ops.moe_experts(x, ids, weights, pack_weight(gate_up), pack_weight(down), num_zero_experts=2)
    return got, reference.moe_experts(x, ids, weights, gate_up, down)


def _headwise_linear(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, weight = _random((5, _HEADS, 32), dtype, generator), _random((_HEADS, 48, 32), torch.bfloat16, generator)
    return ops.headwise_linear(x, pack_weight(weight)), torch.einsum("thd,hod->tho", x.double(), weight.double())


def _rms_norm(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, weight = _random((5, 96), dtype, generator), _random((96,), dtype, generator)
    return ops.rms_norm(x.to(device), weight.to(device), 1e-6), reference.rms_norm(x, weight, 1e-6)


def _apply_rope(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, angles = _random((5, _HEADS, _ROPE), dtype, generator), 100 * torch.rand(5, _ROPE // 2, generator=generator)
    cos, sin = angles.cos(), angles.sin()
    got = ops.apply_rope(x.to(device), cos[:, None].to(device), sin[:, None].to(device), interleaved=True)
    return got, reference.apply_rope(x, cos, sin, interleaved=True)


def _stored_latents(kv_format: ops.KVFormat) -> Case:
    """Written to pages and read back, against the reference's reading of the same bytes."""

    def case(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        c, k_rope = _random((_PAGE, _LATENT), dtype, generator), _random((_PAGE, _ROPE), dtype, generator)
        row = ops.latent_token_bytes(kv_format, _LATENT, _ROPE)
        pages = torch.zeros(2, _PAGE, row, dtype=torch.uint8, device=device)
        slots = torch.arange(_PAGE, 2 * _PAGE)
        ops.write_latents(pages, *(t.to(device) for t in (slots, c, k_rope)), kv_format=kv_format)
        got = ops.read_latents(pages, [1], 0, _PAGE, latent_dim=_LATENT, rope_dim=_ROPE, kv_format=kv_format)
        return got, reference.decode_latents(pages[1].cpu(), kv_format, _LATENT, _ROPE)

    return case


_PACKED_CASES: Mapping[str, Case] = {
    **{f"linear, packed {fmt}": _packed_linear(fmt) for fmt in (BF16, COMPACT, *CODE_FORMATS)},
    "moe_experts, packed": _packed_moe_experts,
    "headwise_linear": _headwise_linear,
}
_CASES: Mapping[str, Case] = {
    "mla_attend": _mla_attend,
    "gqa_attend": _gqa_attend,
    "select_slots": _select_slots,
    "write_pooled_keys": _pooled_keys,
    "expand_streams": _residual_streams,
    "gate_streams": _independent_streams,
    "sink_heads": _sink_heads,
    "kda_attend": _kda_attend,
    "lightning_attend": _lightning_attend,
    "mla_prefill": _mla_prefill,
    "merge_states": _merge_states,
    "moe_experts": _moe_experts,
    "linear": _linear,
    "rms_norm": _rms_norm,
    "apply_rope": _apply_rope,
    "latents as fp8": _stored_latents("fp8"),
    "latents as int8": _stored_latents("int8"),
}
