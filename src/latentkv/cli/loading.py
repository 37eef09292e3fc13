"""What the commands that run a model share: its loading, and what they say of it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from latentkv.cli.terminal import status
from latentkv.errors import ConfigError, RequestError
from latentkv.options import LLMOptions, ModelName
from latentkv.ranges import require_range

if TYPE_CHECKING:
    from latentkv import LLM
    from latentkv.state import PageStore

DEFAULT_NAME = "the small model in this package"


def load_model(options: LLMOptions, *, end_seconds: float = 5) -> LLM:
    """Load a model, saying so on a terminal while it lasts; where several processes run it, the first returns alone.

    Args:
        options: of the model.
        end_seconds: that the processes may take to end after a signal.

    Raises:
        LatentKVError: it cannot be loaded.
    """
    enter_ranks(options, end_seconds=end_seconds)
    return _load(options)


def enter_ranks(options: LLMOptions, *, end_seconds: float = 5) -> None:
    """Become as many processes as are asked for; only the first one of them returns from here, and the only one.

    Args:
        options: of the model that they run.
        end_seconds: that the processes may take to end after a signal.
    """
    if options.num_ranks == 1:
        return
    from latentkv.parallel.process import is_driver, world_size

    if world_size() == 1:
        from latentkv.parallel.launch import launch

        raise typer.Exit(launch(options.num_ranks, sys.argv[1:], end_seconds=end_seconds))
    if not is_driver():
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        _load(options)


def _load(options: LLMOptions) -> LLM:
    with status(f"Loading {options.model or DEFAULT_NAME}"):
        return load_here(options)


def load_here(options: LLMOptions) -> LLM:
    """Load a model in this process, without a word."""
    from latentkv import LLM

    with weights_expected(options.model):
        return LLM(**vars(options))


@contextmanager
def weights_expected(model: str | Path | None) -> Generator[None]:
    """Say of a model that is nowhere that it is a built-in shape, if it is one."""
    try:
        yield
    except ConfigError as error:
        from latentkv.plan import BUILT_IN

        if str(model).lower() not in BUILT_IN or Path(str(model)).exists():
            raise
        raise ConfigError(
            f"{model} is a built-in shape, which `latentkv plan` takes: it has no weights. Name the folder or the repo "
            f"id of a model ({error})."
        ) from error


def model_folder(name: ModelName) -> Path:
    """The folder of a model with its weights, or its GGUF file.

    Raises:
        ConfigError: there is no such model.
    """
    from latentkv.checkpoint.source import resolve_model
    from latentkv.llm_options import embedded_model

    with weights_expected(name.model):
        return embedded_model() if name.model is None else resolve_model(name.model)


def cache_summary(llm: LLM) -> str:
    """What the cache of a loaded model costs a token and how much it holds, for one line."""
    from latentkv.plan import mha_bytes
    from latentkv.sizes import format_bytes
    from latentkv.state import bytes_per_token

    own, mha = bytes_per_token(llm.cache.model_specs), mha_bytes(llm.config)
    room, slots = llm.cache.num_pages * llm.cache.page_size, llm.cache.num_slots
    states = f" and {slots} recurrent states of {format_bytes(llm.cache.sequence_bytes)}" if slots else ""
    ranks = f" in this rank of {llm.ranks.size}, {llm.decoder.stage}" if llm.ranks else ""
    return (
        f"cache: {own:,} bytes a token (bf16 MHA of this model: {mha:,}, {mha / own:.1f}x), "
        f"{format_bytes(llm.cache.allocated_bytes)} for {room:,} tokens{states}{ranks}"
    )


def store_summary(store: PageStore) -> str:
    """What was found in a cache folder, for one line."""
    from latentkv.sizes import format_bytes

    tokens, others = store.num_pages * store.page_size, "" if store.writes else "; this process only reads there"
    return (
        f"{store.folder}: {tokens:,} tokens of this model in {store.num_pages:,} pages, "
        f"{format_bytes(store.total_bytes)} of {format_bytes(store.max_bytes)} in use{others}"
    )


def use_threads(threads: int | None) -> None:
    """Compute with so many CPU threads; None: as it is."""
    import torch

    if threads is not None:
        require_range("threads", threads, RequestError)
        torch.set_num_threads(threads)


def turn_end_note(token: str) -> str:
    """That a token ends answers which no file names as an end, for one line."""
    return f"ends: {token}, too, with which the chat template closes a turn, though no file names it as an end"


def sampling_note(llm: LLM) -> str:
    """What the model recommends for sampling, for one line."""
    from latentkv.generation_config import FILE, describe

    return f"sampling defaults of {FILE}: {describe(llm.sampling_defaults)}"
