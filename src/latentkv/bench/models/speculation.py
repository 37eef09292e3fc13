"""Drafts: how fast a model writes with and without them, and how often they are right."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from latentkv.bench.environment import Environment, describe_environment
from latentkv.bench.timing import Contender, time_interleaved, torch_threads
from latentkv.engine import Engine, SamplingParams
from latentkv.engine.adaptive import AdaptiveDrafter
from latentkv.engine.drafts import Drafter, NGramDrafter
from latentkv.engine.mtp import MTPDrafter
from latentkv.errors import RequestError
from latentkv.llm import LLM
from latentkv.state import PagedCache

OFF = "none"
PROMPTS = {
    "prose": "It was a dark night, and the",
    "repetitive": "The carriage stopped before the gate of the old house, and the old man went to the door. " * 4,
}
_SEEDS = range(3)


@dataclass(frozen=True)
class SpeculationRow:
    """One way of drafting in one case, one sequence at a time.

    Attributes:
        prompt: "prose" or "repetitive".
        temperature: of sampling.
        drafts: by what; "always": whether it pays or not.
        tokens_per_second: median; a prompt's own reading is included, for all alike.
        spread: interquartile range over the median.
        times_faster: than without drafts.
        drafted: tokens drafted for a token written.
        accepted: share of those that were right; None where there were none.
        tokens_per_step: tokens written in a step of the model.
        same_text: as without drafts.
    """

    prompt: str
    temperature: float
    drafts: str
    tokens_per_second: float
    spread: float
    times_faster: float
    drafted: float
    accepted: float | None
    tokens_per_step: float
    same_text: bool


@dataclass(frozen=True)
class SpeculationReport:
    """The measurement, with what is needed to repeat it."""

    environment: Environment
    model: str
    speculate: int
    new_tokens: int
    repeats: int
    rows: tuple[SpeculationRow, ...]


class _Writer:
    """One way of drafting: an engine, and what it has written last."""

    def __init__(self, llm: LLM, drafter: Callable[[PagedCache], Drafter] | None, speculate: int) -> None:
        # Room for an MTP module for all of them, so that they use the same memory.
        mtp = llm.decoder.dtype if llm.decoder.mtp else None
        specs = llm.config.specs(llm.cache.format, mtp=mtp, most_drafted=speculate)
        device, slots = llm.decoder.model.norm.weight.device, max(llm.cache.num_slots, 1)
        cache = PagedCache(specs, llm.cache.num_pages, num_slots=slots, device=device)
        self.llm = llm
        self.engine = Engine(
            llm.decoder, cache, drafter=None if drafter is None else drafter(cache), most_drafted=speculate
        )
        self.written: list[list[int]] = []

    def write(self, prompt: str, params: SamplingParams) -> None:
        """A completion for each seed, one after the other."""
        requests = [self.llm.request(prompt, replace(params, seed=seed)) for seed in _SEEDS]
        self.written = [[event.token_id for event in self.engine.run([request])] for request in requests]

    def row(self, prompt: str, params: SamplingParams) -> tuple[float, float | None, float]:
        """Tokens drafted a token, the share accepted, and tokens a step, of another `write`."""
        before = replace(self.engine.counters)
        self.write(PROMPTS[prompt], params)
        after = self.engine.counters
        written = after.generated_tokens - before.generated_tokens
        drafted, accepted = (
            after.drafted_tokens - before.drafted_tokens,
            after.accepted_tokens - before.accepted_tokens,
        )
        return drafted / written, accepted / drafted if drafted else None, written / (written - accepted)


def measure_speculation(
    llm: LLM,
    *,
    name: str,
    speculate: int = 4,
    new_tokens: int = 200,
    temperatures: Sequence[float] = (0.0, 0.8),
    repeats: int = 5,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> SpeculationReport:
    """Time completions with every way of drafting, in turn.

    Args:
        llm: the model; its cache's number of pages is taken for each way.
        name: how to call it.
        speculate: tokens of a draft at most.
        new_tokens: of a completion.
        temperatures: of sampling.
        repeats: timed rounds.
        threads: torch threads (None: torch's own number).
        progress: told what is being done.

    Raises:
        RequestError: nothing to measure, or the completions do not fit.
    """
    if speculate < 1 or new_tokens < 1 or not temperatures:
        raise RequestError("Nothing to measure: draft 1 token or more, write 1 or more, and give a temperature.")
    rows: list[SpeculationRow] = []
    with torch_threads(threads) as used:
        environment = describe_environment(used)
        writers = _writers(llm, speculate)
        for prompt in PROMPTS:
            for temperature in temperatures:
                progress(f"{prompt} at temperature {temperature:g}")
                params = SamplingParams(max_tokens=new_tokens, temperature=temperature, ignore_eos=True)
                rows += _measure_case(writers, prompt, params, repeats)
    return SpeculationReport(environment, name, speculate, new_tokens, repeats, tuple(rows))


def _writers(llm: LLM, speculate: int) -> dict[str, _Writer]:
    drafters: dict[str, Callable[[PagedCache], Drafter] | None] = {
        OFF: None,
        "n-gram": lambda cache: AdaptiveDrafter(NGramDrafter()),
        "n-gram, always": lambda cache: NGramDrafter(),
    }
    if llm.decoder.mtp:
        drafters |= {
            "MTP": lambda cache: AdaptiveDrafter(MTPDrafter(llm.decoder, cache)),
            "both": lambda cache: AdaptiveDrafter(NGramDrafter(), MTPDrafter(llm.decoder, cache)),
        }
    writers = {name: _Writer(llm, drafter, speculate) for name, drafter in drafters.items()}
    for k in range(1, speculate + 1) if llm.decoder.mtp else ():
        writers[f"MTP, always {k}"] = _Writer(llm, lambda cache: MTPDrafter(llm.decoder, cache), k)
    return writers


def _measure_case(
    writers: dict[str, _Writer], prompt: str, params: SamplingParams, repeats: int
) -> list[SpeculationRow]:
    def contender(writer: _Writer) -> Contender:
        return Contender(lambda: writer.write(PROMPTS[prompt], params))

    timings = time_interleaved({name: contender(writer) for name, writer in writers.items()}, repeats=repeats)
    rows: list[SpeculationRow] = []
    for name, writer in writers.items():
        drafted, accepted, per_step = writer.row(prompt, params)
        off = timings[OFF].seconds
        rows.append(
            SpeculationRow(
                prompt=prompt,
                temperature=params.choice.temperature,
                drafts=name,
                tokens_per_second=len(_SEEDS) * params.max_tokens / timings[name].median,
                spread=timings[name].spread,
                # Round by round: what holds the machine up for a while holds up both.
                times_faster=statistics.median(a / b for a, b in zip(off, timings[name].seconds, strict=True)),
                drafted=drafted,
                accepted=accepted,
                tokens_per_step=per_step,
                same_text=writer.written == writers[OFF].written,
            )
        )
    return rows
