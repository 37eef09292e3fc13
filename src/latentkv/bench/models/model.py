"""A whole model: how fast it reads a prompt and writes after it, at several depths, beside its peers."""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch

from latentkv.bench.ceilings import CeilingProbe
from latentkv.bench.environment import Environment, describe_environment
from latentkv.bench.models.contenders import ModelContender, OtherProgram, OwnDecoder, TransformersModel, random_tokens
from latentkv.bench.models.step_work import decode_flops, prefill_flops, weight_bytes_read, weight_format
from latentkv.bench.models.variants import mha_twin
from latentkv.bench.timing import Timing, time_once, torch_threads
from latentkv.errors import RequestError
from latentkv.llm import LLM
from latentkv.models.config import MLAConfig, ModelConfig
from latentkv.models.packing import EXACT, choose_packing
from latentkv.models.parameters import count_parameters
from latentkv.ops.native.recording import kernel_seconds
from latentkv.state import PagedCache, sequence_bytes

Phase = Literal["prefill", "decode"]

LATENTKV, MHA, TRANSFORMERS = "LatentKV", "LatentKV, MHA", "transformers"
PROMPTS = (512, 2048)
DEPTHS = (0, 4096, 16384, 32768)

_COMPARED_TOKENS = 24
_LEAST_AGREEMENT = 0.5


@dataclass(frozen=True)
class ModelRow:
    """Medians of one contender in one case.

    Attributes:
        contender: whose.
        phase: reading a prompt, or one token a step.
        tokens: of the prompt; or in the cache before the first step, of each sequence.
        sequences: that decode together; a prompt is read alone.
        tokens_per_second: median; of all sequences.
        ms: of the whole prompt (the time to its first token); or of a step.
        spread: interquartile range over the median.
        samples: timed rounds; 1 where a single one was over the time limit.
        times_slower: than LatentKV.
        of_bf16_ceiling: FLOPs of the step (the cheaper form of latent attention) over the time and the bf16 ceiling.
        of_read_ceiling: bytes of weights and cache that a step reads over the time and the read ceiling; None for
            prefill, for several sequences, which choose experts of their own, and where the bytes are not known.
        bf16_ceiling: GFLOP/s of a bf16 matrix product, measured in turn with this.
        read_ceiling: GB/s of reading memory, measured in turn with this.
    """

    contender: str
    phase: Phase
    tokens: int
    sequences: int
    tokens_per_second: float
    ms: float
    spread: float
    samples: int
    times_slower: float
    of_bf16_ceiling: float
    of_read_ceiling: float | None
    bf16_ceiling: float
    read_ceiling: float


@dataclass(frozen=True)
class ModelReport:
    """The measurement of one model, with what is needed to repeat it; sizes in bytes.

    Attributes:
        weight_bytes_read: of the weights that decoding a token reads.
        outside_kernels_ms: of a decode step at the smallest depth: its time less that in native kernels, whose clock
            is in C++; None where none run.
        outside_kernels_share: that over the step.
        agreement: cosine of each contender's logits with LatentKV's, after the same prompt.
        notes: what was not measured and why.
    """

    environment: Environment
    model: str
    parameters: int
    weights: str
    kv_dtype: str
    new_tokens: int
    repeats: int
    weight_bytes_read: int
    cache_bytes_per_token: int
    mha_cache_bytes_per_token: int | None
    allocated_cache_bytes: int
    peak_rss_bytes: int
    outside_kernels_ms: float | None
    outside_kernels_share: float | None
    agreement: Mapping[str, float]
    rows: tuple[ModelRow, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """What is timed."""

    phase: Phase
    tokens: int
    sequences: int = 1


@dataclass(frozen=True)
class Entry:
    """A contender, and what is known of its work.

    Attributes:
        contender: itself.
        config: whose arithmetic it does.
        weight_bytes: read for a token; None: unknown.
        cache_bytes: of a cached token; None: unknown.
        state_bytes: of the sequence's recurrent states, which a step reads and writes.
    """

    contender: ModelContender
    config: ModelConfig
    weight_bytes: int | None = None
    cache_bytes: int | None = None
    state_bytes: int = 0

    def flops(self, case: Case) -> int:
        """Of a prompt, or a step of all sequences."""
        return case.sequences * (prefill_flops if case.phase == "prefill" else decode_flops)(self.config, case.tokens)

    def bytes_read(self, case: Case) -> int | None:
        """By a step; what it writes back of recurrent states counts, too."""
        if case.phase == "prefill" or case.sequences > 1 or self.weight_bytes is None or self.cache_bytes is None:
            return None
        return self.weight_bytes + self.cache_bytes * case.tokens + 2 * self.state_bytes


def measure_model(
    llm: LLM,
    *,
    name: str,
    prompts: Sequence[int] = PROMPTS,
    depths: Sequence[int] = DEPTHS,
    concurrency: Sequence[int] = (1,),
    new_tokens: int = 16,
    repeats: int = 5,
    threads: int | None = None,
    weights: str | None = None,
    activations: str = EXACT,
    mha: bool = False,
    transformers: bool = False,
    peers: Sequence[str] = (),
    limit_seconds: float = 20.0,
    probe: CeilingProbe | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> ModelReport:
    """Time prompts and decode steps, contenders in turn. What is cached before a step is made up once, not computed.

    Args:
        llm: the model; its cache must have room for the deepest case.
        name: how to call it.
        prompts: tokens of the prompts that are read into an empty cache.
        depths: tokens in the cache before the first decode step.
        concurrency: sequences that decode together, at each depth; contenders that cannot are left out.
        new_tokens: decode steps that are timed together.
        repeats: timed rounds.
        threads: torch threads (None: torch's own number).
        weights: how `llm` was asked to quantise its weights.
        activations: how it was asked to take activations; the MHA twin takes them so, too.
        mha: measure the same model with multi-head attention, too.
        transformers: measure the checkpoint in transformers, too.
        peers: commands that start other programs (`OtherProgram`).
        limit_seconds: a contender whose rounds of a case would take longer is timed once.
        probe: of the ceilings, which are measured in turn with the contenders; None: of the usual size.
        progress: told what is being done.

    Raises:
        RequestError: nothing to measure, a case that does not fit, a peer that fails or computes something else.
    """
    cases = [Case("prefill", n) for n in prompts] + [Case("decode", n, many) for n in depths for many in concurrency]
    _require_measurable(llm, cases, new_tokens, repeats)
    with torch_threads(threads) as used, torch.inference_mode(), ExitStack() as stack:
        environment = describe_environment(used)
        own = OwnDecoder(llm.decoder, llm.cache)
        stack.callback(own.close)
        progress("warming up")
        for case in cases[:1] + cases[-1:]:
            _run(own, case, 1)
        peak_rss = peak_rss_bytes()  # before anything that is not ours takes memory
        sizes = weight_bytes_read(llm.decoder), llm.cache.bytes_per_token, sequence_bytes(llm.config.specs("bf16"))
        entries = {LATENTKV: Entry(own, llm.config, *sizes)}
        notes = _add_peers(
            entries, llm, weights, activations, mha, transformers, peers, _most_pages(llm, cases, 64), stack
        )
        progress("comparing logits")
        agreement = compare_logits(entries)
        probe = probe or CeilingProbe()
        rows: list[ModelRow] = []
        for case in cases:
            progress(f"{case.phase} at {case.tokens:,} tokens")
            able = {name: entry for name, entry in entries.items() if entry.contender.most_sequences >= case.sequences}
            rows += _measure_case(able, case, new_tokens, repeats, limit_seconds, probe)
        outside = _outside_kernels(own, min(depths), new_tokens, repeats) if depths else None
    twin = entries.get(MHA)
    return ModelReport(
        environment=environment,
        model=name,
        parameters=count_parameters(llm.config),
        weights=weight_format(llm.decoder),
        kv_dtype=llm.cache.format,
        new_tokens=new_tokens,
        repeats=repeats,
        weight_bytes_read=weight_bytes_read(llm.decoder),
        cache_bytes_per_token=llm.cache.bytes_per_token,
        mha_cache_bytes_per_token=None if twin is None else twin.cache_bytes,
        allocated_cache_bytes=llm.cache.allocated_bytes,
        peak_rss_bytes=peak_rss,
        outside_kernels_ms=None if outside is None else outside[0] * 1e3,
        outside_kernels_share=None if outside is None else outside[0] / outside[1],
        agreement=agreement,
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _require_measurable(llm: LLM, cases: Sequence[Case], new_tokens: int, repeats: int) -> None:
    room = min(llm.max_context, llm.cache.num_pages * llm.cache.page_size) - new_tokens
    if new_tokens < 1 or repeats < 1 or not cases or any(c.tokens < (c.phase == "prefill") for c in cases):
        raise RequestError("Nothing to measure: give a prompt or a depth, and 1 new token and 1 repeat or more.")
    deepest = max(case.tokens for case in cases)
    if deepest > room:
        raise RequestError(f"A depth of {deepest:,} and {new_tokens} new tokens do not fit: at most {room:,} do.")
    most, slots = max(case.sequences for case in cases), llm.cache.slots
    if min(case.sequences for case in cases) < 1:
        raise RequestError("--concurrency takes numbers of sequences, 1 or more.")
    if (pages := _most_pages(llm, cases, new_tokens)) > llm.cache.num_pages or (slots and most > slots.num_slots):
        raise RequestError(
            f"{most} sequences at once need {pages:,} pages of cache, which has {llm.cache.num_pages:,}"
            + (f" and states of {slots.num_slots} sequences" if slots else "")
            + ": give a larger --kv-cache-bytes, or measure fewer or shallower ones."
        )


def _most_pages(llm: LLM, cases: Sequence[Case], new_tokens: int) -> int:
    """Pages that the largest case needs."""
    return max(case.sequences * llm.cache.pages_for(case.tokens + new_tokens) for case in cases)


def _add_peers(
    entries: dict[str, Entry],
    llm: LLM,
    weights: str | None,
    activations: str,
    mha: bool,
    transformers: bool,
    peers: Sequence[str],
    pages: int,
    stack: ExitStack,
) -> list[str]:
    """Fill `entries`; gives notes of what could not be had."""
    notes: list[str] = []
    if mha:
        entries[MHA] = _mha_entry(llm, weights, activations, pages)
    if transformers and isinstance(llm.config.cached_attention, MLAConfig):
        try:
            entries[TRANSFORMERS] = Entry(TransformersModel(llm.folder), llm.config)
        except ImportError as error:
            notes.append(f"transformers was not measured ({error}): pip install transformers==5.23.0")
    for command in peers:
        peer = OtherProgram(command)
        stack.callback(peer.close)
        entries[peer.name] = Entry(peer, llm.config)
    return notes


def _mha_entry(llm: LLM, weights: str | None, activations: str, pages: int) -> Entry:
    packing = choose_packing(weights, llm.decoder.dtype, torch.device("cpu"), activations)
    twin = mha_twin(llm.decoder, packing)
    specs = twin.config.specs("fp32" if llm.decoder.dtype == torch.float32 else "bf16")
    cache = PagedCache(specs, pages + 1)
    return Entry(OwnDecoder(twin, cache), twin.config, weight_bytes_read(twin), cache.bytes_per_token)


def compare_logits(entries: Mapping[str, Entry]) -> dict[str, float]:
    """Cosine of each contender's logits with LatentKV's after one prompt; the MHA twin computes something else.

    Raises:
        RequestError: they have little to do with each other.
    """
    first = entries[LATENTKV]
    prompt = random_tokens(first.config.vocab_size, _COMPARED_TOKENS)
    expected = first.contender.logits(prompt)
    found: dict[str, float] = {}
    for name, entry in entries.items():
        if name in (LATENTKV, MHA):
            continue
        cosine = float(torch.cosine_similarity(entry.contender.logits(prompt), expected, dim=0))
        if not cosine >= _LEAST_AGREEMENT:  # written so that NaN fails too
            raise RequestError(f"{name} computes other logits (cosine {cosine:.3f}): it must be given the same model.")
        found[name] = cosine
    return found


def _measure_case(
    entries: Mapping[str, Entry], case: Case, new_tokens: int, repeats: int, limit: float, probe: CeilingProbe
) -> list[ModelRow]:
    samples: dict[str, list[float]] = {name: [] for name in [*entries, *probe.contenders]}
    once: dict[str, list[float]] = {}
    longest = limit / repeats / (new_tokens if case.phase == "decode" else 1)
    for name, entry in entries.items():
        seconds = _run(entry.contender, case, 1)
        if seconds > longest and case.phase == "decode":  # weights were not in memory yet, or another was not done
            seconds = _run(entry.contender, case, 1)
        if seconds > longest:
            once[name] = [seconds]
    for _ in range(repeats):
        for name, contender in probe.contenders.items():
            samples[name].append(time_once(contender))
        for name, entry in entries.items():
            if name not in once:
                samples[name].append(_run(entry.contender, case, new_tokens))
    timings = {name: Timing(tuple(seconds)) for name, seconds in (samples | once).items()}
    rates = probe.rates(timings)
    return [_row(name, entry, case, timings[name], timings[LATENTKV], rates) for name, entry in entries.items()]


def _run(contender: ModelContender, case: Case, new_tokens: int) -> float:
    """Seconds of a prompt, or of one step."""
    if case.phase == "prefill":
        return contender.prefill(case.tokens)
    together = () if case.sequences == 1 else (case.sequences,)
    return contender.decode(case.tokens, new_tokens, *together) / new_tokens


def _row(name: str, entry: Entry, case: Case, timing: Timing, own: Timing, rates: tuple[float, float]) -> ModelRow:
    seconds, (bf16_ceiling, read_ceiling) = timing.median, rates
    bytes_read = entry.bytes_read(case)
    return ModelRow(
        name,
        phase=case.phase,
        tokens=case.tokens,
        sequences=case.sequences,
        tokens_per_second=(case.tokens if case.phase == "prefill" else case.sequences) / seconds,
        ms=seconds * 1e3,
        spread=timing.spread,
        samples=len(timing.seconds),
        times_slower=seconds / own.median,
        of_bf16_ceiling=entry.flops(case) / seconds / 1e9 / bf16_ceiling,
        of_read_ceiling=None if bytes_read is None else bytes_read / seconds / 1e9 / read_ceiling,
        bf16_ceiling=bf16_ceiling,
        read_ceiling=read_ceiling,
    )


def _outside_kernels(own: OwnDecoder, depth: int, new_tokens: int, repeats: int) -> tuple[float, float] | None:
    """Median seconds of a decode step outside native kernels, and of the whole step."""
    outside: list[float] = []
    steps: list[float] = []
    for _ in range(repeats):
        before = kernel_seconds()
        seconds = own.decode(depth, new_tokens)
        inside = kernel_seconds() - before
        if inside == 0:
            return None
        outside.append((seconds - inside) / new_tokens)
        steps.append(seconds / new_tokens)
    return statistics.median(outside), statistics.median(steps)


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, Linux in KiB.
    return peak if sys.platform == "darwin" else peak * 1024
