"""`latentkv heal`: a converted model learns what its source predicts."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentkv.cli.conversion import EVAL_SEED, SELF, require_length, require_text_options, text_tokens
from latentkv.cli.loading import use_threads
from latentkv.cli.run_facts import run_facts
from latentkv.cli.terminal import console, print_json, progress
from latentkv.convert import HealOptions
from latentkv.errors import RequestError, TrainingError
from latentkv.option_types import Flag
from latentkv.ranges import require_range

if TYPE_CHECKING:
    from torch import Tensor

    from latentkv.convert import Healing

WRITTEN = ".healing-text"
"""Folder in the target of what the source has written, for who goes on after an interruption."""
_HELD_OUT = 32
"""Sequences to measure on, where nothing else says it."""


def heal(
    target: Path,
    /,
    teacher: str,
    *,
    options: HealOptions,
    data: tuple[str, ...] = (SELF,),
    sequences: int | None = None,
    length: int = 512,
    text: str | None = None,
    threads: int | None = None,
    trust_network: bool = False,
    as_json: Annotated[bool, Flag(("--json",))] = False,
) -> None:
    """Train a converted model to predict what its source predicts (distillation), which wins its quality back.

    The model is replaced only by one that is no farther from its source on text that it was not trained on: that of
    --text, or else a part of --data. Its report.html and report.json tell what was done. An interrupted run goes on
    when the same command is given again.
    Under torchrun (torchrun --nproc-per-node 2 -m latentkv heal ...) all processes train the model together.

    Example: latentkv heal llama-mla --teacher path/to/llama --data book.txt

    Args:
        target: the converted model, a local folder; it is trained in place.
        teacher: its source: a folder, its config.json, a .gguf file, or a repo id, also as org/name@revision.
        options: how.
        data: text to train on: a UTF-8 text file, or self: what the source writes by itself; given several times, equal
            shares of each.
        sequences: sequences of text, gone through again and again; None is one for each sequence of every step, as far
            as a file has them.
        length: tokens of a sequence.
        text: measure the perplexity on this, before and after: a file, or self; None is the text that the conversion
            was measured on.
        threads: CPU threads; None is all cores.
        trust_network: let processes talk over addresses that are not private, in the clear.
        as_json: print what was done as JSON.
    """
    from dataclasses import asdict

    from latentkv.checkpoint.source import local_folder, resolve_model
    from latentkv.convert import heal_checkpoint, held_out_sequences, require_healable
    from latentkv.resumable import alone_in
    from latentkv.train.ranks import DataRanks

    ranks = DataRanks.join(trust_network=trust_network)
    use_threads(threads)
    require_text_options(sequences, length, *data, text)
    if sequences is not None:
        require_range("batch_size", options.batch_size, RequestError, high=sequences)
    asked = sequences or options.steps * options.batch_size
    target = local_folder(target)
    text, count, width = _held_out(target, text, _held_out_count(sequences), length)
    if text is None and options.eval_every is not None:
        raise RequestError("--eval-every needs a text to measure on: give --text.")
    folder = resolve_model(teacher)
    require_healable(target, folder, options, processes=ranks.size)
    require_length(folder, max(length, width))
    own = held_out_sequences(asked) if text is None else 0
    written = target / WRITTEN

    def training_text() -> Tensor:
        return text_tokens(
            folder,
            data,
            asked + own,
            length,
            seed=asked,
            stage="Healing text",
            at_most=sequences is None,
            kept=written,
        )

    def held_out_text(text: str) -> Tensor:
        return text_tokens(folder, [text], count, width, seed=EVAL_SEED, stage="Held-out text")

    with ranks.together(), alone_in(target, TrainingError) if ranks.is_first else nullcontext():
        tokens = ranks.from_first(training_text)
        held_out = None if text is None else ranks.from_first(lambda: held_out_text(text))
        with progress("Heal", silent=not ranks.is_first) as on_progress:
            healing = heal_checkpoint(
                target,
                folder,
                tokens,
                options,
                held_out=held_out,
                about={"data": data[0] if len(data) == 1 else data, "text": text, **run_facts(ranks.size)},
                on_progress=on_progress,
                ranks=ranks,
            )
        if ranks.is_first and healing is not None:
            shutil.rmtree(written, ignore_errors=True)
        ranks.leave()
    if healing is None:
        if ranks.is_first:
            console(stderr=True).print("Stopped and saved. The same command goes on from there.")
        raise typer.Exit(130)
    if not ranks.is_first:
        return
    if as_json:
        print_json(asdict(healing))
    else:
        _print_healing(healing, target)


def _held_out_count(sequences: int | None) -> int:
    """How many sequences to measure on where nothing else says it."""
    return _HELD_OUT if sequences is None else max(sequences // 16, 8)


def _held_out(target: Path, text: str | None, sequences: int, length: int) -> tuple[str | None, int, int]:
    """Text, sequences and length to measure on: as the conversion was, so that the report compares like with like."""
    from latentkv.convert import REPORT_FILE, read_record

    path, measured = target / REPORT_FILE, read_record(target).get("quality")
    if measured is None:
        return text, sequences, length
    from latentkv.saved_values import saved_in

    with saved_in(path, RequestError, "remove it, and the model stays without its report"):
        known, sequences, length = str(measured["text"]), measured["sequences"], measured["length"]
        require_range("sequences", sequences, RequestError)
        require_range("length", length, RequestError)
    if text is None and known != SELF and not Path(known).is_file():
        raise RequestError(f"{known}, which the conversion was measured on, is not there: give --text.")
    return text or known, sequences, length


def _print_healing(healing: Healing, target: Path) -> None:
    from latentkv.convert import PAGE_FILE

    out = console()
    window = max(1, len(healing.losses) // 20)
    first, last = (sum(part) / len(part) for part in (healing.losses[:window], healing.losses[-window:]))
    out.print(
        f"KL to the source {first:.4f} to {last:.4f} nats a token; {healing.tokens:,} tokens, {healing.seconds:.0f} s"
    )
    if healing.evaluations:
        before, after = healing.evaluations[0], healing.evaluations[-1]
        out.print(
            f"perplexity {before['converted']:.4g} before, {after['converted']:.4g} after, "
            f"{after['source']:.4g} of the source; the likeliest token is the same for {after['agreement']:.1%}"
        )
    out.print(f"{target}: report in {target / PAGE_FILE}")
