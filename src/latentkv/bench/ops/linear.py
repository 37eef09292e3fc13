"""Products with packed weights, from one row (decoding one sequence) to thousands (reading a prompt), beside torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

import torch
from torch import Tensor
from torch.nn import functional

from latentkv import ops
from latentkv.bench.ceilings import CeilingProbe, multiplies_bf16_fast
from latentkv.bench.environment import Environment, describe_environment
from latentkv.bench.ops.torch_linear import torch_products
from latentkv.bench.timing import Contender, time_interleaved, torch_threads
from latentkv.errors import OpError, RequestError
from latentkv.weights import QuantizedWeight, quantize_weight
from latentkv.weights.formats import BF16, CODE_FORMATS, COMPACT, INTEGER_PRODUCTS, ROUNDED_TO
from latentkv.weights.layout import PackedWeight, pack_weight
from latentkv.weights.rounding import round_plainly

FORMATS = (BF16, COMPACT, *CODE_FORMATS)
USUAL_FORMATS = (BF16, COMPACT, *ROUNDED_TO)
TORCH, TORCH_FP32 = "torch, bf16", "torch, fp32"
"""Torch's own product of the weights: as float32 numbers where bf16 ones take it many times as long."""

ROWS = (1, 2, 4, 8, 16, 48, 64, 256, 512, 2048)
ROTATED_BYTES = 256 << 20
"""Bytes of the matrices that are used in turn: several times the last-level cache, so that they come from memory."""

TOLERANCE = 0.02
"""Largest error, over the largest output, that bf16 activations and sums explain."""

_CHECKED_OUTPUTS = 64
_GROUP_OF_FILES = 32


@dataclass(frozen=True)
class LinearRow:
    """What one contender did with one number of rows.

    Attributes:
        contender: "linear, FORMAT", and "linear, FORMAT x int8" with activations of 8 bits; or "torch, FORMAT", torch's
            own product of the same weights where it has one.
        rows: M, of x.
        us: median microseconds of a product.
        spread: interquartile range over the median.
        weight_bytes: of one matrix as it is stored.
        gbps: weight_bytes over the time, GB/s.
        read_ceiling: GB/s of reading memory, measured in turn with this.
        of_read_ceiling: gbps over it; what limits few rows.
        gflops: 2 M O D over the time, GFLOP/s.
        bf16_ceiling: GFLOP/s of a bf16 matrix product, measured in turn with this.
        of_bf16_ceiling: gflops over it; what limits many rows.
        max_error: largest difference from a float64 product, over its largest element.
        times_faster_than_torch: the median of torch's product of the weights as they were over this one.
    """

    contender: str
    rows: int
    us: float
    spread: float
    weight_bytes: int
    gbps: float
    read_ceiling: float
    of_read_ceiling: float
    gflops: float
    bf16_ceiling: float
    of_bf16_ceiling: float
    max_error: float
    times_faster_than_torch: float


@dataclass(frozen=True)
class LinearReport:
    """The whole table, with what is needed to repeat it."""

    environment: Environment
    out_features: int
    in_features: int
    repeats: int
    rows: tuple[LinearRow, ...]


@dataclass(frozen=True)
class LinearEntry:
    """One contender.

    Attributes:
        multiply: x [M, D] and the number of a matrix -> [M, O].
        count: matrices of one shape, used in turn.
        weight_bytes: of one of them.
        exact: the first outputs' weights [few, D] of matrix 0, as they are stored, in float64.
    """

    multiply: Callable[[Tensor, int], Tensor]
    count: int
    weight_bytes: int
    exact: Tensor


def as_packed_format(name: str) -> str:
    """The packed format of that name.

    Raises:
        RequestError: there is none.
    """
    if name not in FORMATS:
        raise RequestError(f"{name!r} is no format of packed weights; choose from {', '.join(FORMATS)}.")
    return name


def measure_linear(
    *,
    out_features: int = 8192,
    in_features: int = 2048,
    rows: Sequence[int] = ROWS,
    formats: Sequence[str] = USUAL_FORMATS,
    group: int | None = None,
    rounded_input: bool = False,
    repeats: int = 15,
    threads: int | None = None,
    probe: CeilingProbe | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> LinearReport:
    """Time `x W^T` for bf16 x [M, D] and W [O, D] that comes from memory; every product is checked first.

    Args:
        out_features: O.
        in_features: D.
        rows: numbers of rows M.
        formats: how weights are packed, of `FORMATS`.
        group: weights that share a scale; None: the format's own default, or 32.
        rounded_input: measure products with activations of 8 bits, too, where a format has them.
        repeats: timed rounds.
        threads: torch threads (None: torch's own number).
        probe: of the ceilings, which are measured in turn with the contenders; None: of the usual size.
        progress: told what is being done.

    Raises:
        RequestError: nothing to measure.
        OpError: no such group; or a product is wrong, so that its time would mean nothing.
    """
    if not rows or min(*rows, out_features, in_features) < 1:
        raise RequestError(
            f"Nothing to measure: rows {list(rows)}, a matrix of {out_features} x {in_features}; use numbers from 1."
        )
    with torch_threads(threads) as used, torch.inference_mode():
        environment = describe_environment(used)
        probe = probe or CeilingProbe()
        progress("packing weights")
        entries = _entries(out_features, in_features, formats, group, rounded_input)
        measured: list[LinearRow] = []
        for m in rows:
            progress(f"{m} rows")
            measured += _measure(entries, m, repeats, probe)
    return LinearReport(environment, out_features, in_features, repeats, tuple(measured))


def _measure(entries: Mapping[str, LinearEntry], rows: int, repeats: int, probe: CeilingProbe) -> list[LinearRow]:
    in_features = next(iter(entries.values())).exact.shape[1]
    x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows)).bfloat16()
    errors = {name: _checked_error(name, entry, x) for name, entry in entries.items()}
    products = max(1, 128 // max(rows, 16))  # in a timed step: a single one would be too short for the clock
    contenders = {name: Contender(_step(entry, x, products)) for name, entry in entries.items()}
    timings = time_interleaved(contenders | probe.contenders, repeats=repeats)
    bf16_ceiling, read_ceiling = probe.rates(timings)
    of_torch = timings[TORCH if TORCH in entries else TORCH_FP32].median
    measured: list[LinearRow] = []
    for name, entry in entries.items():
        seconds = timings[name].median / products
        out_features = entry.multiply(x[:1], 0).shape[1]
        gbps, gflops = entry.weight_bytes / seconds / 1e9, 2 * rows * out_features * in_features / seconds / 1e9
        measured.append(
            LinearRow(
                name,
                rows=rows,
                us=seconds * 1e6,
                spread=timings[name].spread,
                weight_bytes=entry.weight_bytes,
                gbps=gbps,
                read_ceiling=read_ceiling,
                of_read_ceiling=gbps / read_ceiling,
                gflops=gflops,
                bf16_ceiling=bf16_ceiling,
                of_bf16_ceiling=gflops / bf16_ceiling,
                max_error=errors[name],
                times_faster_than_torch=of_torch / products / seconds,
            )
        )
    return measured


def _step(entry: LinearEntry, x: Tensor, products: int) -> Callable[[], None]:
    matrices = cycle(range(entry.count))

    def step() -> None:
        for index in islice(matrices, products):
            entry.multiply(x, index)

    return step


def _entries(
    out_features: int, in_features: int, formats: Sequence[str], group: int | None = None, rounded_input: bool = False
) -> dict[str, LinearEntry]:
    count = -(-ROTATED_BYTES // (2 * out_features * in_features))
    plain = torch.empty(count, out_features, in_features, dtype=torch.bfloat16)
    plain.normal_(0, in_features**-0.5, generator=torch.Generator().manual_seed(0))
    name, torchs = (TORCH, plain) if multiplies_bf16_fast() else (TORCH_FP32, plain.float())
    entries = {
        name: LinearEntry(
            lambda x, index: functional.linear(x.to(torchs.dtype), torchs[index]),
            count,
            torchs[0].nbytes,
            plain[0, :_CHECKED_OUTPUTS].double(),
        )
    }
    for name in formats:
        if name not in CODE_FORMATS:
            packed = pack_weight(plain, compact=name == COMPACT)
            if packed.format != name:  # without the extension, or where it would save nothing
                continue
            entries[f"linear, {name}"] = _packed_entry(packed, plain[0, :_CHECKED_OUTPUTS].double())
            continue
        one = _quantized(plain[0], name, group)
        exact = one.dequantize()[:_CHECKED_OUTPUTS].double()
        copies = -(-ROTATED_BYTES // one.nbytes)
        packed = pack_weight(_stacked(one, copies))
        entries[f"linear, {name}"] = _packed_entry(packed, exact)
        if rounded_input and name in INTEGER_PRODUCTS:
            entries[f"linear, {name} x int8"] = _packed_entry(packed.rounding_input(), exact)
        products = torch_products(one, copies)
        if products is not None:
            entries[f"torch, {name}"] = LinearEntry(
                lambda x, index, products=products: products[index](x), copies, one.nbytes, exact
            )
    return entries


def _packed_entry(packed: PackedWeight, exact: Tensor) -> LinearEntry:
    matrices = [packed.matrix(index) for index in range(packed.count)]
    return LinearEntry(
        lambda x, index: ops.linear(x, matrices[index]), packed.count, packed.nbytes // packed.count, exact
    )


def _stacked(weight: QuantizedWeight, copies: int) -> QuantizedWeight:
    def repeated(part: Tensor) -> Tensor:
        return part.expand(copies, *part.shape)

    minima = None if weight.minima is None else repeated(weight.minima)
    return replace(weight, codes=repeated(weight.codes), scales=repeated(weight.scales), minima=minima)


def _quantized(weight: Tensor, name: str, group: int | None) -> QuantizedWeight:
    if name in ROUNDED_TO:
        return quantize_weight(weight, name, group)
    return round_plainly(weight, CODE_FORMATS[name], group or _GROUP_OF_FILES)


def _checked_error(name: str, entry: LinearEntry, x: Tensor) -> float:
    """Largest difference of the first outputs from a float64 product, over its largest element."""
    expected = x.double() @ entry.exact.T
    out = entry.multiply(x, 0)
    error = float((out[:, : expected.shape[1]].double() - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE:  # written so that NaN fails too
        raise OpError(
            f"{name} differs from the float64 product by {error:.2%} of its largest element, more than "
            f"{TOLERANCE:.0%}: its time would mean nothing."
        )
    return error
