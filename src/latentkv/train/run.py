"""One training run from end to end: tokenizer, data, model, loop, and the folder that is left behind."""

from __future__ import annotations

import filecmp
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from latentkv.checkpoint.wrapper import text_config
from latentkv.errors import TrainingError
from latentkv.files import write_json
from latentkv.fingerprint import fingerprint
from latentkv.json_files import read_json
from latentkv.models.config_reader import read_config, read_model_json
from latentkv.models.decoder import Decoder
from latentkv.models.loading import load_model, save_pretrained
from latentkv.ranges import require_range
from latentkv.resumable import alone_in
from latentkv.targets import require_folder
from latentkv.text import Tokenizer, has_tokenizer, load_tokenizer
from latentkv.text.bpe_trainer import save_tokenizer, train_bpe
from latentkv.train.data import Corpus, find_corpus, write_tokens
from latentkv.train.evaluate import eval_sets
from latentkv.train.gathered import gathered
from latentkv.train.options import TrainingPlan, TrainOptions
from latentkv.train.ranks import DataRanks
from latentkv.train.report import Reporter, plot_losses
from latentkv.train.stopping import stop_on_signal
from latentkv.train.trainer import Trainer
from latentkv.train.weights import initialize
from latentkv.train.windows import Windows

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tiktoken.model",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def train_model(
    plan: TrainingPlan, options: TrainOptions, console: Console | None = None, ranks: DataRanks | None = None
) -> bool:
    """Train, or go on training, until the end or Ctrl-C.

    Args:
        plan: what to train and where it goes.
        options: how.
        console: where to report; None: standard error.
        ranks: the processes that train together, of which the first one reports and writes; None: this one alone.

    Returns:
        True when training is complete and `plan.out` holds the model; False when it was interrupted.

    Raises:
        TrainingError: the data, the options or the checkpoint to resume cannot be used, or the loss diverged.
    """
    ranks = ranks or DataRanks()
    console = console or Console(stderr=True, quiet=not ranks.is_first)
    if not ranks.is_first:
        plan = replace(plan, restart=False)  # the first one has forgotten the earlier run
    raw = _model_config(plan)
    config = read_config(raw)
    if options.seq_len > config.max_positions:
        raise TrainingError(
            f"--seq-len {options.seq_len} is longer than the model's max_position_embeddings {config.max_positions}: "
            "use a shorter one, or stretch the model with --rope-scaling yarn:FACTOR."
        )
    require_range("eval_fraction", plan.eval_fraction, TrainingError)
    require_range("eval_bytes", plan.eval_bytes, TrainingError)
    require_folder(plan.out, TrainingError, apart=[("the checkpoint of --init", plan.init)] if plan.init else [])
    corpus = _corpus(plan)
    if not ranks.is_first:
        return _train(plan, options, raw, corpus, console, ranks)
    plan.out.mkdir(parents=True, exist_ok=True)
    with alone_in(plan.out, TrainingError):
        return _train(plan, options, raw, corpus, console, ranks)


def _train(
    plan: TrainingPlan, options: TrainOptions, raw: dict[str, Any], corpus: Corpus, console: Console, ranks: DataRanks
) -> bool:
    """`train_model`, once nothing stands against it."""
    config = read_config(raw)
    with ranks.first_alone():
        if plan.restart:
            for name in ("checkpoints", "data"):
                shutil.rmtree(plan.out / name, ignore_errors=True)
        tokenizer, tokens = _encoded(plan, corpus, config.vocab_size, console)
    separator = _separator(tokenizer)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_bos=False)

    windows = Windows(
        tokens,
        seq_len=options.seq_len,
        lookahead=1 + config.num_mtp_layers,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    decoder = _decoder(plan, raw, options.seed)
    parameters = sum(p.numel() for p in decoder.parameters())
    trainer = Trainer(
        decoder,
        windows,
        options,
        mtp_layers=len(decoder.mtp),
        evaluations=eval_sets(corpus, encode, separator, merged=not plan.eval_files),
        identity=fingerprint([_data_facts(plan)["sha256"].encode(), raw]),
        ranks=ranks,
    )
    checkpoints = plan.out / "checkpoints"
    resumed = trainer.resume(checkpoints)
    with (
        Reporter(plan.out, console, resume_step=trainer.step, silent=not ranks.is_first) as reporter,
        stop_on_signal(together=ranks.size > 1) as stopped,
    ):
        verb = f"Resuming at step {trainer.step}" if resumed else "Training"
        reporter.say(
            f"{verb}: {parameters / 1e6:.2f}M parameters, {len(tokens) / 1e6:.2f}M tokens of text in "
            f"{len(corpus.training)} documents, {options.batch_tokens} tokens a step, "
            f"{torch.get_num_threads()} threads{f' in each of {ranks.size} processes' if ranks.size > 1 else ''}."
        )
        if not trainer.run(checkpoints, reporter, lambda: bool(stopped)):
            reporter.say(f"Stopped and saved at step {trainer.step}. The same command goes on from there.")
            return False
        finished = gathered(decoder, ranks)
        if ranks.is_first:
            save_pretrained(finished, plan.out)
            _write_summary(plan, options, trainer, reporter.records)
        reporter.say(f"Done: {plan.out} holds the model.")
    return True


def prepare_text(plan: TrainingPlan, console: Console) -> None:
    """Have the text of a run encoded, as `train_model` does before it trains; runs on the same text find it done.

    Raises:
        TrainingError: as `train_model`, of the data.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    _encoded(plan, _corpus(plan), read_config(_model_config(plan)).vocab_size, console)


def _corpus(plan: TrainingPlan) -> Corpus:
    return find_corpus(
        plan.data,
        exclude=plan.exclude,
        eval_files=plan.eval_files,
        eval_fraction=plan.eval_fraction,
        eval_bytes=plan.eval_bytes,
    )


def _encoded(
    plan: TrainingPlan, corpus: Corpus, vocab_size: int, console: Console
) -> tuple[Tokenizer, NDArray[np.uint16 | np.uint32]]:
    """The run's tokenizer, and its training text as token ids."""
    tokenizer = _tokenizer(plan, corpus, vocab_size, console)
    tokens = write_tokens(
        plan.tokens_file,
        corpus,
        lambda text: tokenizer.encode(text, add_bos=False),
        _separator(tokenizer),
        vocab_size,
        fingerprint((plan.out / name).read_bytes() for name in TOKENIZER_FILES[:3] if (plan.out / name).is_file()),
    )
    return tokenizer, tokens


def _model_config(plan: TrainingPlan) -> dict[str, Any]:
    """The config.json to build, `--rope-scaling` applied."""
    if plan.config is None and plan.init is None:
        raise TrainingError("Say what to train: a config.json, or --init CHECKPOINT.")
    if plan.config is not None:
        raw = read_model_json(plan.config / "config.json" if plan.config.is_dir() else plan.config)
    else:
        raw = read_model_json(plan.init / "config.json") if plan.init else {}
    return stretch_rope(raw, plan.rope_scaling) if plan.rope_scaling else raw


def stretch_rope(raw: dict[str, Any], scaling: str) -> dict[str, Any]:
    """A config with its context stretched by `scaling` ("yarn:FACTOR"; arXiv 2309.00071), as DeepSeek-V3 has it."""
    kind, _, number = scaling.partition(":")
    try:
        factor = float(number)
    except ValueError:
        factor = 0.0
    if kind != "yarn" or not factor > 1:
        raise TrainingError(
            f"--rope-scaling must be yarn:FACTOR with a factor above 1, such as yarn:8, not {scaling!r}."
        )
    config = read_config(raw)
    if config.rope.kind != "default":
        raise TrainingError("--rope-scaling: this config stretches its rotary embedding already.")
    rope_scaling = {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": config.max_positions,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    # Of a wrapper the text model; `rope_theta` and `rope_scaling` in place of transformers 5's `rope_parameters`.
    kept = {key: value for key, value in text_config(raw).items() if key != "rope_parameters"}
    return {
        **kept,
        "rope_theta": config.rope.theta,
        "rope_scaling": rope_scaling,
        "max_position_embeddings": int(config.max_positions * factor),
    }


def _tokenizer(plan: TrainingPlan, corpus: Corpus, vocab_size: int, console: Console) -> Tokenizer:
    """The run's tokenizer; its files end up in `plan.out`."""
    source = plan.tokenizer or plan.init
    if source is not None:
        for name in TOKENIZER_FILES:
            theirs, own = source / name, plan.out / name
            # What is there already may be being read by another process of this run.
            if theirs.is_file() and not (own.exists() and filecmp.cmp(theirs, own, shallow=False)):
                shutil.copyfile(theirs, own)
    elif plan.restart or not has_tokenizer(plan.out):
        console.print(f"Training a BPE tokenizer of {vocab_size} tokens ...")
        save_tokenizer(train_bpe(corpus.training_texts(), vocab_size), plan.out)
    tokenizer = load_tokenizer(plan.out)
    if tokenizer.vocab_size > vocab_size:
        raise TrainingError(
            f"The tokenizer has {tokenizer.vocab_size} tokens but the model's vocab_size is {vocab_size}: "
            "raise vocab_size or choose another tokenizer."
        )
    return tokenizer


def _separator(tokenizer: Tokenizer) -> int:
    """The id before each document: begin of sequence, or end of sequence where there is no other."""
    if tokenizer.bos_id is not None:
        return tokenizer.bos_id
    if tokenizer.eos_ids:
        return min(tokenizer.eos_ids)
    raise TrainingError("The tokenizer has neither a begin nor an end of sequence token to put between documents.")


def _decoder(plan: TrainingPlan, raw: dict[str, Any], seed: int) -> Decoder:
    """The model to train, float32: fresh, or with the weights of `plan.init`."""
    config = read_config(raw)
    decoder = Decoder(config)
    if plan.init is None:
        initialize(decoder, config.initializer_range, config.num_layers + config.num_mtp_layers, seed)
        return decoder.train()
    loaded = load_model(plan.init, dtype=torch.float32)
    if plan.config is None:  # a checkpoint's own config may count MTP layers that its files lack
        decoder.drop_mtp_modules(keep=range(len(loaded.mtp)))
    ours, theirs = ({n: tuple(t.shape) for n, t in m.state_dict().items()} for m in (decoder, loaded))
    if ours != theirs:
        different = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
        raise TrainingError(f"--init {plan.init} does not fit the config: {different[0]} differs; leave CONFIG out.")
    decoder.load_state_dict(loaded.state_dict())
    return decoder.train()


def _data_facts(plan: TrainingPlan) -> dict[str, Any]:
    """What `write_tokens` noted of the encoded text."""
    return read_json(plan.tokens_file.with_name(f"{plan.tokens_file.name}.json"), TrainingError)


def _write_summary(plan: TrainingPlan, options: TrainOptions, trainer: Trainer, records: list[dict[str, Any]]) -> None:
    """training.json and loss.png."""
    evaluations = [r["bits_per_byte"] for r in records if r.get("bits_per_byte")]
    tokens = trainer.step * options.batch_tokens
    summary = {
        "command": ["latentkv", *plan.command[1:]],
        "options": options.to_dict(),
        "data": {**_data_facts(plan), "excluded": list(plan.exclude)},
        "steps": trainer.step,
        "tokens": tokens,
        "minutes": round(trainer.clock.elapsed / 60, 1),
        "torch": torch.__version__,
        "bits_per_byte": evaluations[-1] if evaluations else {},
        "log": records,
    }
    write_json(plan.out / "training.json", summary)
    plot_losses(records, plan.out / "loss.png", f"{plan.out.name}: {tokens / 1e6:.1f}M tokens")
