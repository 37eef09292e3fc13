"""`latentkv convert` and `latentkv heal`: a grouped-query model into a latent-attention one."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from latentkv.cli.options import ThreadsOption, use_threads
from latentkv.cli.terminal import console, print_json
from latentkv.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from latentkv import LLM
    from latentkv.convert import ConversionReport

SELF = "self"
_EVAL_SEED = 1_000_000

TextOption = Annotated[str, typer.Option(help="A UTF-8 text file, or self: what the source writes by itself.")]


def convert(
    source: Annotated[str, typer.Argument(help="The model: a folder or a repo id.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="A new folder for the converted model.", show_default=False)],
    kv_budget: Annotated[
        str | None, typer.Option(help="Share of the source's KV cache to keep, like 1/4; chooses rank and rope-dim.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the latent, instead of --kv-budget.")] = None,
    rope_dim: Annotated[int | None, typer.Option(help="Dimensions of the shared key with RoPE; with --rank.")] = None,
    calibrate: TextOption = SELF,
    method: Annotated[str, typer.Option(help="weighted; transmla and svd are there to be compared with.")] = "weighted",
    fold: Annotated[int, typer.Option(help="Of transmla: frequencies that share a basis.")] = 1,
    export: Annotated[
        str, typer.Option(help="The engine, besides LatentKV, that the checkpoint is for: transformers or vllm.")
    ] = "transformers",
    sequences: Annotated[int, typer.Option(help="Of calibration text.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    text: Annotated[
        str | None, typer.Option(help="Report the perplexity on this, before and after: a file, or self.")
    ] = None,
    threads: ThreadsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Turn a model with grouped-query (or multi-head) attention into one with latent attention.

    The result is a dense DeepSeek-V3 checkpoint, which transformers or vLLM loads too. What it costs in quality is in
    its report; `latentkv heal` wins most of it back. An interrupted run goes on when the same command is given again.

    Example: latentkv convert path/to/llama llama-mla --kv-budget 1/4 --calibrate book.txt
    """
    from latentkv import LLM
    from latentkv.checkpoint import resolve_model
    from latentkv.convert import REPORT_FILE, ConvertOptions, Export, Method, convert_checkpoint, require_convertible

    use_threads(threads)
    if method not in get_args(Method):
        raise RequestError(f"--method={method} is not known: choose {', '.join(get_args(Method))}.")
    if export not in get_args(Export):
        raise RequestError(f"--export={export} is not known: choose {', '.join(get_args(Export))}.")
    budget = None if kv_budget is None else _share(kv_budget)
    options = ConvertOptions(rank, rope_dim, budget, cast("Method", method), fold, cast("Export", export))
    folder = resolve_model(source)
    require_convertible(folder, options)
    llm = LLM(folder, dtype="fp32")
    _require_length(llm, length)
    tokens = _tokens(llm, calibrate, sequences, length, seed=0)
    held_out = None if text is None else _tokens(llm, text, max(sequences // 4, 8), length, seed=_EVAL_SEED)
    del llm
    with _progress("Convert") as on_progress:
        report = convert_checkpoint(folder, target, tokens, options, on_progress=on_progress)
    measured = None if held_out is None else _measure(folder, target, held_out, cast(str, text))
    if measured is not None:
        _note(target / REPORT_FILE, {"perplexity": measured})
    if as_json:
        print_json(report.as_json() | {"perplexity": measured})
    else:
        _print_report(report, target, measured)


def heal(
    target: Annotated[Path, typer.Argument(help="The converted model; it is trained in place.", show_default=False)],
    teacher: Annotated[str, typer.Option(help="Its source: a folder or a repo id.", show_default=False)],
    data: TextOption = SELF,
    sequences: Annotated[int, typer.Option(help="Of text; they are gone through again and again.")] = 512,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    steps: Annotated[int, typer.Option(help="Of the optimiser.")] = 500,
    match_steps: Annotated[int, typer.Option(help="Of these, the first match each layer's attention alone.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Sequences a step.")] = 8,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    train: Annotated[str, typer.Option(help="all weights, or attention.")] = "all",
    text: Annotated[str | None, typer.Option(help="Report the perplexity on this, before and after.")] = None,
    threads: ThreadsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Train a converted model to predict what its source predicts (distillation), which wins its quality back.

    An interrupted run goes on when the same command is given again.

    Example: latentkv heal llama-mla --teacher path/to/llama --data book.txt
    """
    from dataclasses import asdict

    from latentkv import LLM
    from latentkv.checkpoint import resolve_model
    from latentkv.convert import HEALING_FILE, HealOptions, heal_checkpoint

    use_threads(threads)
    if train not in ("all", "attention"):
        raise RequestError(f"--train={train} is not allowed: choose all or attention.")
    folder = resolve_model(teacher)
    llm = LLM(folder, dtype="fp32")
    _require_length(llm, length)
    tokens = _tokens(llm, data, sequences, length, seed=sequences)
    held_out = None if text is None else _tokens(llm, text, max(sequences // 16, 8), length, seed=_EVAL_SEED)
    del llm
    before = None if held_out is None else _measure(folder, target, held_out, cast(str, text))
    with _progress("Heal") as on_progress:
        healing = heal_checkpoint(
            target,
            folder,
            tokens,
            HealOptions(steps, match_steps, batch_size, lr, train),
            on_progress=lambda step, total, loss: on_progress(f"KL {loss:.4f}", step, total),
        )
    after = None if held_out is None else _measure(folder, target, held_out, cast(str, text))
    if after is not None:
        _note(target / HEALING_FILE, {"before": before, "after": after})
    if as_json:
        print_json(asdict(healing) | {"before": before, "after": after})
        return
    out = console()
    window = max(1, len(healing.losses) // 20)
    first, last = (sum(part) / len(part) for part in (healing.losses[:window], healing.losses[-window:]))
    out.print(
        f"KL to the source {first:.4f} to {last:.4f} nats a token; {healing.tokens:,} tokens, {healing.seconds:.0f} s"
    )
    if before and after:
        out.print(
            f"perplexity {before['converted']:.4g} before, {after['converted']:.4g} after, "
            f"{after['source']:.4g} of the source"
        )


def _share(text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise RequestError(f"--kv-budget={text} is no share: write 1/4 or 0.25.") from None


def _require_length(llm: LLM, length: int) -> None:
    if not 16 <= length <= llm.max_context:
        raise RequestError(f"--length={length} is not allowed: this model takes 16 to {llm.max_context:,} tokens.")


def _tokens(llm: LLM, text: str, sequences: int, length: int, *, seed: int) -> Tensor:
    from latentkv.convert.text import tokens_of_file, tokens_of_model

    if sequences < 8:
        raise RequestError(f"--sequences={sequences} is too few: give 8 or more.")
    if text != SELF:
        return tokens_of_file(llm, Path(text), sequences=sequences, length=length)
    with _progress("Text") as on_progress:
        return tokens_of_model(
            llm,
            sequences=sequences,
            length=length,
            seed=seed,
            on_token=lambda done, total: on_progress("from the source", done, total),
        )


def _measure(source: Path, converted: Path, tokens: Tensor, text: str) -> dict[str, Any]:
    from latentkv.convert.quality import compare_models

    with console(stderr=True).status("Perplexity"):
        return {"text": text} | compare_models(source, converted, tokens)


def _note(path: Path, content: dict[str, Any]) -> None:
    from latentkv.files import write_json
    from latentkv.models.config_reader import read_json

    write_json(path, read_json(path) | content)


@contextmanager
def _progress(title: str) -> Generator[Callable[[str, int, int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    out = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, disable=not out.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda what, done, total: bar.update(task, description=f"{title}: {what}", completed=done, total=total)


def _print_report(report: ConversionReport, target: Path, measured: dict[str, Any] | None) -> None:
    from rich.table import Table

    from latentkv.convert import REPORT_FILE, VLLM_LATENT_WIDTHS

    out = console()
    table = Table(title="error of the attention's output", title_justify="left")
    for column in ("layer", "error, %", "RoPE energy, %", "factors' energy, %"):
        table.add_column(column, justify="right")
    for row in report.layers:
        numbers = (row.output_error, row.rope_energy, row.kept_energy)
        table.add_row(str(row.layer), *(f"{100 * number:.1f}" for number in numbers))
    out.print(table)
    share = report.cached_after / report.cached_before
    out.print(
        f"rank {report.rank} and {report.rope_dim} dimensions with RoPE: {report.cached_after} numbers a token and "
        f"layer, were {report.cached_before} ({share:.0%})"
    )
    if measured is not None:
        out.print(
            f"perplexity  {measured['source']:.4g} before, {measured['converted']:.4g} after; "
            f"the likeliest token is the same for {measured['agreement']:.1%}"
        )
    out.print(f"for {', '.join(report.read_by)}, and no other engine")
    if report.export == "vllm" and report.cached_after not in VLLM_LATENT_WIDTHS:
        widths = ", ".join(map(str, VLLM_LATENT_WIDTHS))
        out.print(
            f"vLLM caches latents of {widths} numbers, not {report.cached_after}: with VLLM_MLA_DISABLE=1 it runs this "
            "model, and caches keys and values of every head"
        )
    out.print(f"{target}: all figures in {target / REPORT_FILE}; latentkv heal wins quality back")
