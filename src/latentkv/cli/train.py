"""`latentkv train`: any supported model shape, from a folder of text, on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from latentkv.cli.flags import Preset
from latentkv.cli.loading import use_threads
from latentkv.option_types import Flag
from latentkv.train import TrainingPlan, TrainOptions


def train(
    config: Annotated[str | None, Flag(("--model", "-m"))] = None,
    /,
    *,
    plan: Annotated[TrainingPlan, Preset("config", "encoded", "command", out=Path("trained"))],
    options: Annotated[TrainOptions, Preset("betas", "momentum")],
    threads: int | None = None,
    trust_network: bool = False,
) -> None:
    """Train a model from a folder of text.

    Shapes: any supported config.json (MLA or GQA, dense or MoE, MTP). Ctrl-C saves; the same command goes on.
    Under torchrun (torchrun --nproc-per-node 2 -m latentkv train ...) all processes train one model together.

    Example: latentkv train config.json --data books --out my-model --time-limit 60 --optimizer muon

    Args:
        config: what to train from scratch, of which only the config is read: a folder, its config.json, a .gguf file,
            or a repo id, also as org/name@revision; not needed with `init`.
        plan: what is trained, and on what.
        options: how.
        threads: CPU threads; None is all cores.
        trust_network: let processes talk over addresses that are not private, in the clear.
    """
    from latentkv.checkpoint.source import resolve_config, resolve_folder, resolve_tokenizer
    from latentkv.train import train_model
    from latentkv.train.ranks import DataRanks

    ranks = DataRanks.join(trust_network=trust_network)
    use_threads(threads)
    plan = replace(
        plan,
        config=None if config is None else resolve_config(config),
        init=None if plan.init is None else resolve_folder(plan.init),
        tokenizer=None if plan.tokenizer is None else resolve_tokenizer(plan.tokenizer),
    )
    with ranks.together():
        complete = train_model(plan, options, ranks=ranks)
        ranks.leave()
    if not complete:
        raise typer.Exit(130)
