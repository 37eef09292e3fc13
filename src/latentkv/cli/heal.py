"""`latentkv heal`: a converted model learns what its source predicts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from latentkv.cli.conversion import (
    EVAL_SEED,
    SELF,
    progress,
    require_length,
    require_text_options,
    run_facts,
    text_tokens,
)
from latentkv.cli.loading import use_threads
from latentkv.cli.terminal import console, print_json
from latentkv.errors import RequestError
from latentkv.option_types import Flag
from latentkv.ranges import require_range

if TYPE_CHECKING:
    from torch import Tensor

    from latentkv.convert import Healing
    from latentkv.convert.heal_options import Trained


def heal(
    target: Path,
    /,
    teacher: str,
    *,
    data: str = SELF,
    sequences: int = 512,
    length: int = 512,
    steps: int = 500,
    match_steps: int = 0,
    batch_size: int = 8,
    lr: float = 1e-3,
    train: str = "all",
    lora_rank: int = 16,
    lora_alpha: float = 16.0,
    text: str | None = None,
    eval_every: int | None = None,
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
        data: text to train on: a UTF-8 text file, or self: what the source writes by itself.
        sequences: sequences of text; they are gone through again and again.
        length: tokens of a sequence.
        steps: steps of the optimiser.
        match_steps: how many of these come first and match each layer's attention alone.
        batch_size: sequences a step.
        lr: highest learning rate.
        train: what learns: all weights, attention, or lora: low-rank updates of attention.
        lora_rank: rank of the updates, with `train` lora.
        lora_alpha: an update counts alpha / rank times.
        text: measure the perplexity on this, before and after: a file, or self; None is the text that the conversion
            was measured on.
        eval_every: measure it every so many steps as well; None is before and after.
        threads: CPU threads; None is all cores.
        trust_network: let processes talk over addresses that are not private, in the clear.
        as_json: print what was done as JSON.
    """
    from dataclasses import asdict

    from latentkv.checkpoint.source import local_folder, resolve_model
    from latentkv.convert import HealOptions, heal_checkpoint, held_out_sequences, require_healable
    from latentkv.train.ranks import DataRanks

    ranks = DataRanks.join(trust_network=trust_network)
    use_threads(threads)
    options = HealOptions(steps, match_steps, batch_size, lr, cast("Trained", train), lora_rank, lora_alpha, eval_every)
    require_text_options(sequences, length, data, text)
    require_range("batch_size", batch_size, RequestError, high=sequences)
    target = local_folder(target)
    text, count, width = _held_out(target, text, max(sequences // 16, 8), length)
    if text is None and eval_every is not None:
        raise RequestError("--eval-every needs a text to measure on: give --text.")
    folder = resolve_model(teacher)
    require_healable(target, folder, options, processes=ranks.size)
    require_length(folder, max(length, width))
    own = held_out_sequences(sequences) if text is None else 0

    def tokens_of(text: str, sequences: int, length: int, seed: int, stage: str) -> Tensor:
        return ranks.from_first(
            lambda: text_tokens(folder, text, sequences, length, seed=seed, stage=stage), (sequences, length)
        )

    with ranks.together():
        tokens = tokens_of(data, sequences + own, length, sequences, "Healing text")
        held_out = None if text is None else tokens_of(text, count, width, EVAL_SEED, "Held-out text")
        with progress("Heal", silent=not ranks.is_first) as on_progress:
            healing = heal_checkpoint(
                target,
                folder,
                tokens,
                options,
                held_out=held_out,
                about={"data": data, "text": text, **run_facts(ranks.size)},
                on_progress=on_progress,
                ranks=ranks,
            )
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
