"""`latentkv generate`: a prompt in, its continuation out as it comes."""

from __future__ import annotations

import secrets
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from latentkv.cli.options import (
    ActivationsOption,
    CacheBytesOption,
    CacheDirBytesOption,
    CacheDirOption,
    DeviceOption,
    DtypeOption,
    Int8ProductsOption,
    KVDtypeOption,
    MaxContextOption,
    MinPOption,
    ModelChoice,
    ModelOption,
    NoPackedDirOption,
    PackedDirBytesOption,
    PackedDirOption,
    PenaltyOption,
    PipelineParallelOption,
    RankTimeoutOption,
    SeedOption,
    TemperatureOption,
    TensorParallelOption,
    TopKOption,
    TopPOption,
    TrustNetworkOption,
    WeightsOption,
    cache_summary,
    store_summary,
)
from latentkv.cli.structure_options import ChoiceOption, GrammarOption, RegexOption, SchemaOption, read_structure
from latentkv.cli.terminal import console, note, print_json
from latentkv.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from latentkv import LLM, SamplingParams
    from latentkv.completion import Piece
    from latentkv.engine import TokenLogprobs


def generate(
    prompt: Annotated[list[str], typer.Argument(help="The text to continue; - reads it from stdin.")],
    model: ModelOption = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="New tokens at most.")] = 256,
    temperature: TemperatureOption = 0.8,
    top_p: TopPOption = 0.95,
    top_k: TopKOption = 0,
    min_p: MinPOption = 0.0,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; repeatable.")] = None,
    json_schema: SchemaOption = None,
    regex: RegexOption = None,
    choice: ChoiceOption = None,
    grammar: GrammarOption = None,
    logprobs: Annotated[
        int | None, typer.Option(help="Also show each token's log-probability and so many alternatives.")
    ] = None,
    token_ids: Annotated[bool, typer.Option("--token-ids", help="The prompt is token ids, like 1 17 42.")] = False,
    weights: WeightsOption = None,
    activations: ActivationsOption = "exact",
    kv_dtype: KVDtypeOption = "auto",
    int8_products: Int8ProductsOption = False,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    max_context: MaxContextOption = None,
    kv_cache_bytes: CacheBytesOption = None,
    cache_dir: CacheDirOption = None,
    cache_dir_bytes: CacheDirBytesOption = None,
    packed_dir: PackedDirOption = None,
    no_packed_dir: NoPackedDirOption = False,
    packed_dir_bytes: PackedDirBytesOption = None,
    pipeline_parallel: PipelineParallelOption = 1,
    tensor_parallel: TensorParallelOption = 1,
    rank_timeout: RankTimeoutOption = 60,
    trust_network: TrustNetworkOption = False,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print text as it comes, or at the end.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")] = False,
) -> None:
    """Continue a prompt.

    The text goes to stdout; speed and the size of the cache to stderr.

    Example: latentkv generate "It was a dark night" --max-tokens 100 --seed 1
    """
    # Other ranks wait for this one's to be loaded, not for what somebody writes.
    given = _read_given(prompt, token_ids) if pipeline_parallel * tensor_parallel == 1 else None
    from latentkv import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=secrets.randbelow(2**32) if seed is None else seed,
        stop=tuple(stop or ()),
        logprobs=logprobs,
        structure=read_structure(json_schema, regex, choice, grammar),
    )
    chosen = ModelChoice(
        *(model, device, dtype, weights, activations, kv_dtype, int8_products, max_context, kv_cache_bytes),
        cache_dir=cache_dir,
        cache_dir_bytes=cache_dir_bytes,
        packed_dir=packed_dir,
        no_packed_dir=no_packed_dir,
        packed_dir_bytes=packed_dir_bytes,
        pipeline_parallel=pipeline_parallel,
        tensor_parallel=tensor_parallel,
        rank_timeout=rank_timeout,
        trust_network=trust_network,
    )
    chosen.enter_ranks()
    llm = chosen.load()
    given = _read_given(prompt, token_ids) if given is None else given
    if llm.store:
        note(store_summary(llm.store))
    run = _Run(llm, given, params)
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


def _read_given(words: list[str], token_ids: bool) -> str | list[int]:
    text = _read_prompt(words)
    return _read_ids(text) if token_ids else text


def _read_prompt(words: list[str]) -> str:
    try:
        text = sys.stdin.read() if words == ["-"] else " ".join(words)
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
