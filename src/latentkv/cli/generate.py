"""`latentkv generate`: a prompt in, its continuation out as it comes."""

from __future__ import annotations

import secrets
import sys
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

from latentkv.cli.flags import Preset
from latentkv.cli.loading import cache_summary, load_model, sampling_note, store_summary
from latentkv.cli.structure_options import StructureOptions
from latentkv.cli.terminal import console, note, print_json
from latentkv.errors import RequestError
from latentkv.option_types import Flag
from latentkv.options import LLMOptions
from latentkv.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator

    from latentkv import LLM
    from latentkv.completion import Piece
    from latentkv.engine import TokenLogprobs

Sampling = Annotated[
    SamplingParams,
    Preset("logit_bias", "structure", "prompt_logprobs", "n", "best_of"),
]
"""Of the commands: one answer."""
OWN_DEFAULTS = {"temperature": 0.8, "top_p": 0.95}
"""Of sampling, where the model recommends nothing: livelier than the bare distribution is safe."""


def generate(
    prompt: tuple[str, ...],
    /,
    sampling: Sampling,
    structure: StructureOptions,
    options: LLMOptions,
    *,
    token_ids: bool = False,
    stream: bool = True,
    as_json: Annotated[bool, Flag(("--json",))] = False,
) -> None:
    """Continue a prompt.

    The text goes to stdout; speed and the size of the cache to stderr.

    Example: latentkv generate "It was a dark night" --max-tokens 100 --seed 1

    Args:
        prompt: the text to continue; - reads it from stdin.
        sampling: how tokens are chosen.
        structure: the form that the text must have.
        options: the model.
        token_ids: the prompt is token ids, like 1 17 42.
        stream: print text as it comes, or at the end.
        as_json: print one JSON document instead.
    """
    # Other ranks wait for this one's to be loaded, not for what somebody writes.
    given = _read_given(prompt, token_ids) if options.num_ranks == 1 else None
    seed = secrets.randbelow(2**32) if sampling.seed is None else sampling.seed
    params = replace(sampling, seed=seed, structure=structure.read())
    llm = load_model(options)
    given = _read_given(prompt, token_ids) if given is None else given
    if llm.store:
        note(store_summary(llm.store))
    if llm.sampling_defaults:
        note(sampling_note(llm))
    run = _Run(llm, given, params.with_defaults(llm.sampling_defaults or OWN_DEFAULTS))
    if as_json:
        run.finish()
        print_json(run.as_json())
        return
    if sys.stdout.isatty() and isinstance(given, str):  # so that the text reads as a whole
        console().print(given, style="dim", markup=False, soft_wrap=True, end="")
    for piece in run.pieces():
        if stream:
            print(piece, end="", flush=True)
    print(end="" if stream else run.text)
    if llm.tokenizer is None:
        print(*run.ids, end="")
    print(flush=True)
    if run.logprobs:
        _print_logprobs(llm, run.logprobs)
    note(run.summary())


class _Run:
    """One completion and the clock beside it."""

    def __init__(self, llm: LLM, prompt: str | list[int], params: SamplingParams) -> None:
        self.llm = llm
        self.params = params
        self.text = ""
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self._stream: Iterator[Piece] = llm.stream(prompt, params)
        self._started = self._first = self._last = time.perf_counter()

    def pieces(self) -> Iterator[str]:
        """The text, as it comes."""
        for piece in self._stream:
            self._last = time.perf_counter()
            if not self.ids:
                self._first = self._last
            self.text += piece.text
            self.ids += piece.token_ids
            self.logprobs += piece.logprobs or []
            self.finish_reason = piece.finish_reason
            if piece.text:
                yield piece.text

    def finish(self) -> None:
        """Run to the end."""
        for _ in self.pieces():
            pass

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding, the first token (which waits for the prompt) left out."""
        seconds = self._last - self._first
        return (len(self.ids) - 1) / seconds if seconds > 0 else None

    def summary(self) -> str:
        """One line about how it went."""
        speed = "" if self.tokens_per_second is None else f" at {self.tokens_per_second:,.1f} tokens/s"
        seed = "" if self.params.greedy else f"; seed {self.params.seed}"
        first = f"the first after {self._first - self._started:.2f} s"
        return f"{len(self.ids)} tokens{speed}, {first}{seed}; {cache_summary(self.llm)}"

    def as_json(self) -> dict[str, object]:
        """All of it."""
        from latentkv.plan import mha_bytes

        return {
            "text": self.text,
            "token_ids": self.ids,
            "logprobs": [asdict(entry) for entry in self.logprobs] if self.params.logprobs is not None else None,
            "finish_reason": self.finish_reason,
            "seed": self.params.seed,
            "seconds_to_first_token": self._first - self._started,
            "tokens_per_second": self.tokens_per_second,
            "cache_bytes_per_token": self.llm.cache.bytes_per_token,
            "mha_cache_bytes_per_token": mha_bytes(self.llm.config),
            "cache_allocated_bytes": self.llm.cache.allocated_bytes,
        }


def _read_given(words: tuple[str, ...], token_ids: bool) -> str | list[int]:
    text = _read_prompt(words)
    return _read_ids(text) if token_ids else text


def _read_prompt(words: tuple[str, ...]) -> str:
    try:
        text = sys.stdin.read() if words == ("-",) else " ".join(words)
    except UnicodeDecodeError as error:
        raise RequestError(f"The input is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    if not text:
        raise RequestError('The prompt is empty; write for example: latentkv generate "Once upon a time".')
    return text


def _read_ids(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    for word in words:
        if not word.removeprefix("-").isdecimal():
            raise RequestError(f"{word!r} is not a token id; with --token-ids the prompt is numbers like 1 17 42.")
    return [int(word) for word in words]


def _print_logprobs(llm: LLM, logprobs: list[TokenLogprobs]) -> None:
    from rich.table import Table
    from rich.text import Text

    def name(token: int) -> str:
        return repr(llm.tokenizer.decode([token], skip_special=False)) if llm.tokenizer else str(token)

    table = Table("token", "log-probability", "likeliest")
    for entry in logprobs:
        others = ", ".join(f"{name(token)} {value:.3f}" for token, value in entry.top.items())
        table.add_row(Text(name(entry.token_id)), f"{entry.logprob:.4f}", Text(others))
    console().print(table)
