"""One decode step of `mla_decode` on a GPU, as fractions of what the GPU's own product and copy reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from latentkv import ops
from latentkv.bench.gpu.timing import GpuCeilings, GpuEnvironment, describe_gpu, time_on
from latentkv.bench.ops.mla_decode import LATENT_DIM, ROPE_DIM, TOLERANCE
from latentkv.errors import OpError, RequestError
from latentkv.ops import KVFormat
from latentkv.ops.backends import why_not_triton
from latentkv.ops.triton.blocks import AttendBlocks
from latentkv.ops.triton.launch import Launch
from latentkv.state.spec import PAGE_SIZE, LatentSpec

KV_FORMATS: tuple[KVFormat, ...] = ("bf16", "fp8")
CALLS = 5
_WRITTEN_TOKENS = 1 << 16


@dataclass(frozen=True)
class GpuCase:
    """Sequences of one length, each with one new token."""

    heads: int
    batch: int
    context: int


CASES = (
    *(GpuCase(heads, 128, context) for heads in (128, 16) for context in (4096, 8192, 16384, 32768)),
    *(GpuCase(heads, 1, context) for heads in (128, 16) for context in (32768, 131072)),
)
"""FlashMLA's batch of 128, and one sequence alone."""


@dataclass(frozen=True)
class GpuRow:
    """What one format of the pages did in one case.

    Attributes:
        heads: H.
        batch: sequences.
        context: cached tokens of each, the new one included.
        kv_format: how the pages are stored.
        ms: median milliseconds of a call.
        spread: interquartile range over the median.
        tflops: 2 H (2 L + R) a cached token and sequence, over the time, TFLOP/s.
        bf16_ceiling: TFLOP/s of a bf16 matrix product, measured in turn with this.
        of_bf16_ceiling: tflops over it.
        gbps: the cached tokens read once, over the time, GB/s.
        copy_ceiling: GB/s of a copy, measured in turn with this.
        of_copy_ceiling: gbps over it.
        max_error: largest difference from the float64 answer, over the largest element of it.
    """

    heads: int
    batch: int
    context: int
    kv_format: KVFormat
    ms: float
    spread: float
    tflops: float
    bf16_ceiling: float
    of_bf16_ceiling: float
    gbps: float
    copy_ceiling: float
    of_copy_ceiling: float
    max_error: float


@dataclass(frozen=True)
class GpuReport:
    """The whole table, with what is needed to repeat it."""

    environment: GpuEnvironment
    repeats: int
    calls: int
    rows: tuple[GpuRow, ...]


@dataclass(frozen=True)
class PagedCase:
    """The tensors of one case, on the GPU.

    Attributes:
        q: [B, 1, H, L + R] bf16.
        pages: [N, P, row].
        table: [B, M] int32.
        lens: [B] int32.
        kv_format: how the pages are stored.
    """

    q: Tensor
    pages: Tensor
    table: Tensor
    lens: Tensor
    kv_format: KVFormat

    @classmethod
    def random(cls, case: GpuCase, kv_format: KVFormat, device: torch.device) -> PagedCase:
        """Pages in no order, as after hours of serving; scores are spread over a few units."""
        generator = torch.Generator(device).manual_seed(0)
        pages_each = -(-case.context // PAGE_SIZE)
        count = case.batch * pages_each
        zeros = partial(torch.zeros, device=device)
        pages = LatentSpec(LATENT_DIM, ROPE_DIM, kv_format).allocate(count, PAGE_SIZE, zeros)
        order = torch.randperm(count, generator=generator, device=device)
        for slots in torch.arange(count * PAGE_SIZE, device=device).split(_WRITTEN_TOKENS):
            tokens = torch.randn(len(slots), LATENT_DIM + ROPE_DIM, generator=generator, device=device).bfloat16()
            ops.write_latents(pages, slots, tokens[:, :LATENT_DIM], tokens[:, LATENT_DIM:], kv_format=kv_format)
        q = torch.randn(case.batch, 1, case.heads, LATENT_DIM + ROPE_DIM, generator=generator, device=device)
        lens = torch.full((case.batch,), case.context, dtype=torch.int32, device=device)
        return cls(2 * q.bfloat16(), pages, order.view(case.batch, pages_each).to(torch.int32), lens, kv_format)

    def step(self) -> Tensor:
        """What is timed: [B, H, L]."""
        scale = (LATENT_DIM + ROPE_DIM) ** -0.5
        pages = self.pages, self.table, self.lens
        return ops.mla_decode(self.q, *pages, latent_dim=LATENT_DIM, scale=scale, kv_format=self.kv_format)[0][:, 0]

    def launches(self, blocks: AttendBlocks) -> Sequence[Launch]:
        """The kernels of a step with block sizes of choice."""
        from latentkv.ops.triton import attention

        q, (batch, _, heads, _) = self.q[:, 0], self.q.shape
        q_start = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        return attention.attend_pages(
            q,
            self.pages,
            attention.Rows(self.table, q_start, None, self.lens, PAGE_SIZE),
            torch.empty(batch, heads, LATENT_DIM, dtype=q.dtype, device=q.device),
            torch.empty(batch, heads, device=q.device),
            scale=(LATENT_DIM + ROPE_DIM) ** -0.5,
            kv_format=self.kv_format,
            blocks=blocks,
        )

    def max_error(self) -> float:
        """Of the first and last sequence, from the float64 answer over the numbers that the pages hold."""
        out, worst = self.step(), 0.0
        for b in {0, len(self.q) - 1}:
            cached = ops.read_latents(
                self.pages,
                self.table[b],
                0,
                int(self.lens[b]),
                latent_dim=LATENT_DIM,
                rope_dim=ROPE_DIM,
                kv_format=self.kv_format,
            ).double()
            scores = self.q[b, 0].double() @ cached.T * (LATENT_DIM + ROPE_DIM) ** -0.5
            expected = scores.softmax(-1) @ cached[:, :LATENT_DIM]
            worst = max(worst, float((out[b].double() - expected).abs().max() / expected.abs().max()))
        return worst


def measure_gpu_attention(
    device: torch.device,
    *,
    cases: Sequence[GpuCase] = CASES,
    kv_formats: Sequence[KVFormat] = KV_FORMATS,
    repeats: int = 20,
    calls: int = CALLS,
    ceilings: GpuCeilings | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> GpuReport:
    """Time `mla_decode` at L + R = 512 + 64 in every case and format; every answer is checked first.

    Args:
        device: the GPU; a CPU only where Triton's interpreter is named, for tests.
        cases: sizes.
        kv_formats: how the pages are stored.
        repeats: timed rounds.
        calls: calls queued in a round.
        ceilings: timed in turn with the formats; None: of the usual sizes.
        progress: told what is being done.

    Raises:
        RequestError: nothing to measure, or Triton's kernels do not run there.
        OpError: an answer is wrong, so that its time would mean nothing.
    """
    reason = why_not_triton(device)
    if reason is not None:
        raise RequestError(f"Attention cannot be measured on {device}: Triton's kernels {reason}.")
    if not cases or not kv_formats:
        raise RequestError("Nothing to measure: give a case and a format of the pages.")
    with torch.inference_mode():
        environment, ceilings = describe_gpu(device), ceilings or GpuCeilings(device)
        rows: list[GpuRow] = []
        for case in cases:
            progress(f"{case.heads} heads, batch {case.batch}, {case.context:,} tokens")
            rows += _measure(device, case, kv_formats, repeats, calls, ceilings)
    return GpuReport(environment, repeats, calls, tuple(rows))


def _measure(
    device: torch.device,
    case: GpuCase,
    kv_formats: Sequence[KVFormat],
    repeats: int,
    calls: int,
    ceilings: GpuCeilings,
) -> list[GpuRow]:
    paged: Mapping[KVFormat, PagedCase] = {name: PagedCase.random(case, name, device) for name in kv_formats}
    errors = {name: _checked_error(name, tensors) for name, tensors in paged.items()}
    steps = {name: partial(tensors.step) for name, tensors in paged.items()}
    timings = time_on(device, {**steps, **ceilings.steps}, repeats=repeats, calls=calls)
    bf16_ceiling, copy_ceiling = ceilings.rates(timings)
    rows: list[GpuRow] = []
    for name in kv_formats:
        seconds, tokens = timings[name].median, case.batch * case.context
        tflops = 2 * case.heads * (2 * LATENT_DIM + ROPE_DIM) * tokens / seconds / 1e12
        gbps = tokens * ops.latent_payload_bytes(name, LATENT_DIM, ROPE_DIM) / seconds / 1e9
        rows.append(
            GpuRow(
                heads=case.heads,
                batch=case.batch,
                context=case.context,
                kv_format=name,
                ms=seconds * 1e3,
                spread=timings[name].spread,
                tflops=tflops,
                bf16_ceiling=bf16_ceiling,
                of_bf16_ceiling=tflops / bf16_ceiling,
                gbps=gbps,
                copy_ceiling=copy_ceiling,
                of_copy_ceiling=gbps / copy_ceiling,
                max_error=errors[name],
            )
        )
    return rows


def _checked_error(name: KVFormat, tensors: PagedCase) -> float:
    error, tolerance = tensors.max_error(), TOLERANCE["bf16"]
    if not error <= tolerance:  # written so that NaN fails too
        raise OpError(
            f"mla_decode over {name} pages differs from the float64 answer by {error:.2%} of its largest element, more "
            f"than {tolerance:.0%}: its time would mean nothing."
        )
    return error
