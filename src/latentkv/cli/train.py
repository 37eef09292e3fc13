"""`latentkv train`: any supported model shape, from a folder of text, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentkv.cli.options import MODEL_FORMS, TrustNetworkOption, use_threads


def train(
    config: Annotated[
        str | None,
        typer.Argument(
            help=f"What to train from scratch, of which only the config is read: {MODEL_FORMS}. Not needed with --init."
        ),
    ] = None,
    data: Annotated[
        Path, typer.Option(help="Folder of .txt files, or one text file.", exists=True, show_default=False)
    ] = ...,  # pyright: ignore[reportArgumentType]
    out: Annotated[
        Path, typer.Option(help="Folder for the model, checkpoints and logs. Resumes what it holds.")
    ] = Path("trained"),
    steps: Annotated[int | None, typer.Option(help="Train this many steps (reproducible).")] = None,
    time_limit: Annotated[
        float | None, typer.Option(help="Or: train this many minutes; the learning rate follows the clock.")
    ] = None,
    init: Annotated[
        str | None, typer.Option(help=f"Start from this model instead of fresh weights: {MODEL_FORMS}.")
    ] = None,
    rope_scaling: Annotated[
        str | None, typer.Option(help="Stretch the context, e.g. yarn:8 (with --init and a longer --seq-len).")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A model whose tokenizer to take; else --init's, or a BPE trained on the data.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="File name to keep out of training and tokenizer; repeatable.")
    ] = None,
    eval_file: Annotated[
        list[Path] | None,
        typer.Option(help="Text to report bits per byte of (never trained on); repeatable.", exists=True),
    ] = None,
    eval_fraction: Annotated[float, typer.Option(help="Without --eval-file: hold out this much of each file.")] = 0.01,
    eval_bytes: Annotated[int, typer.Option(help="About how much text to evaluate.")] = 200_000,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations; 0: only at the end.")] = 200,
    seq_len: Annotated[int, typer.Option(help="Tokens a sequence.")] = 512,
    batch_tokens: Annotated[int, typer.Option(help="Tokens an optimiser step.")] = 16384,
    micro_batch: Annotated[int, typer.Option(help="Sequences a forward pass (memory; not results).")] = 4,
    optimizer: Annotated[str, typer.Option(help="adamw, or muon (hidden matrices; AdamW for the rest).")] = "adamw",
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    min_lr: Annotated[float, typer.Option(help="Last learning rate, as a fraction of --lr.")] = 0.05,
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = 100,
    weight_decay: Annotated[float, typer.Option(help="On matrices only.")] = 0.1,
    grad_clip: Annotated[float, typer.Option(help="Largest gradient norm; 0: none.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32 to compute in; master weights are float32.")] = "bf16",
    mtp_weight: Annotated[float, typer.Option(help="Weight of the multi-token-prediction loss; 0: off.")] = 0.3,
    mtp_start: Annotated[float, typer.Option(help="Fraction of training after which that loss joins.")] = 0.0,
    bias_speed: Annotated[
        float, typer.Option(help="Step of the bias that balances experts; short runs need more, such as 0.02.")
    ] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of initialisation and data order.")] = 0,
    save_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 5.0,
    log_every: Annotated[int, typer.Option(help="Steps between log lines.")] = 10,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget an earlier run in --out.")] = False,
    trust_network: TrustNetworkOption = False,
) -> None:
    """Train a model from a folder of text.

    Shapes: any supported config.json (MLA or GQA, dense or MoE, MTP). Ctrl-C saves; the same command goes on.
    Under torchrun (torchrun --nproc-per-node 2 -m latentkv train ...) all processes train one model together.

    Example: latentkv train config.json --data books --out my-model --time-limit 60 --optimizer muon
    """
    from latentkv.checkpoint.source import resolve_config, resolve_folder, resolve_tokenizer
    from latentkv.train import TrainingPlan, TrainOptions, train_model
    from latentkv.train.ranks import DataRanks

    ranks = DataRanks.join(trust_network=trust_network)
    use_threads(threads)
    options = TrainOptions(
        steps=steps,
        time_limit=time_limit,
        seq_len=seq_len,
        batch_tokens=batch_tokens,
        micro_batch=micro_batch,
        optimizer=optimizer,  # pyright: ignore[reportArgumentType]  (checked by TrainOptions)
        lr=lr,
        min_lr=min_lr,
        warmup=warmup,
        weight_decay=weight_decay,
        grad_clip=grad_clip,
        dtype=dtype,  # pyright: ignore[reportArgumentType]  (checked by TrainOptions)
        mtp_weight=mtp_weight,
        mtp_start=mtp_start,
        bias_speed=bias_speed,
        seed=seed,
        eval_every=eval_every,
        save_minutes=save_minutes,
        log_every=log_every,
    )
    plan = TrainingPlan(
        data=data,
        out=out,
        config=None if config is None else resolve_config(config),
        init=None if init is None else resolve_folder(init),
        tokenizer=None if tokenizer is None else resolve_tokenizer(tokenizer),
        exclude=tuple(exclude or ()),
        eval_files=tuple(eval_file or ()),
        eval_fraction=eval_fraction,
        eval_bytes=eval_bytes,
        rope_scaling=rope_scaling,
        restart=restart,
    )
    with ranks.together():
        complete = train_model(plan, options, ranks=ranks)
        ranks.leave()
    if not complete:
        raise typer.Exit(130)
