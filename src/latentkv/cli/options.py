"""Options that several commands share, and the model that they describe."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentkv.cli.terminal import status
from latentkv.errors import ConfigError, RequestError
from latentkv.ranges import require_range

if TYPE_CHECKING:
    from latentkv import LLM
    from latentkv.state import PageStore

MODEL_FORMS = "a folder, its config.json, a .gguf file, or a repo id, also as org/name@revision"
"""What every command takes for a model (`checkpoint.source` reads it)."""

ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help=f"The model: {MODEL_FORMS}.", show_default="the small model in this package"),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, or cuda where there is an NVIDIA GPU.")]
DtypeOption = Annotated[
    str | None, typer.Option(help="Of the weights: bf16, fp16 or fp32.", show_default="as the checkpoint stores them")
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        help="Quantise the weights as they are read: int8 or int4.", show_default="as the checkpoint stores them"
    ),
]
ActivationsOption = Annotated[
    str, typer.Option(help="int8: round them to 8 bits where they meet quantised weights; faster, less exact.")
]
KVDtypeOption = Annotated[str, typer.Option(help="Of the cache: bf16, fp8, int8, fp16, fp32 or auto (as the weights).")]
Int8ProductsOption = Annotated[
    bool, typer.Option("--int8-products", help="With --kv-dtype int8: decode faster at depth, less exactly.")
]
MaxContextOption = Annotated[
    str | None,
    typer.Option(help="Prompt and answer together, in tokens, like 4096 or 32k.", show_default="the model's longest"),
]
CacheBytesOption = Annotated[
    str | None,
    typer.Option(
        help="Size of the KV cache, like 2GiB.", show_default="one full context, or half of the free memory if less"
    ),
]
CacheDirOption = Annotated[
    Path | None,
    typer.Option(
        help="Keep the state of prompts in files of this folder, and read it back; it holds what was prompted.",
        show_default="in memory only",
    ),
]
CacheDirBytesOption = Annotated[
    str | None, typer.Option(help="That these files may take, like 50GiB.", show_default="10GiB")
]
PackedDirOption = Annotated[
    Path | None,
    typer.Option(
        help="Keep packed weights in this folder and map them at the next start.",
        show_default="~/.cache/latentkv/packed",
    ),
]
NoPackedDirOption = Annotated[
    bool, typer.Option("--no-packed-dir", help="Pack the weights anew and keep nothing for the next start.")
]
PackedDirBytesOption = Annotated[
    str | None,
    typer.Option(help="That packed weights may take there, like 50GiB.", show_default="half of what the disk has free"),
]
PipelineParallelOption = Annotated[
    int,
    typer.Option(
        min=1,
        max=1024,
        help="Processes that run the model together, each with its own layers; over several machines by torchrun.",
    ),
]
TensorParallelOption = Annotated[
    int,
    typer.Option(
        min=1,
        max=1024,
        help="Processes of one machine that work on each layer together, each with its own heads and width of experts.",
    ),
]
RankTimeoutOption = Annotated[
    float, typer.Option(min=2, max=86400, help="Seconds without a word of one of them after which it is given up.")
]
TrustNetworkOption = Annotated[
    bool, typer.Option("--trust-network", help="Let them talk over addresses that are not private, in the clear.")
]
TemperatureOption = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
TopPOption = Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability, in (0, 1].")]
TopKOption = Annotated[int, typer.Option(help="Keep this many likeliest tokens; 0 keeps all.")]
MinPOption = Annotated[float, typer.Option(help="Keep tokens at least this times as likely as the likeliest.")]
PenaltyOption = Annotated[float, typer.Option(help="Above 1 repeats less.")]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")]
SeedOption = Annotated[int | None, typer.Option(help="Same seed, same text.", show_default="a fresh one")]


@dataclass(frozen=True)
class ModelChoice:
    """Which model to load and how, as the command line says it."""

    model: str | None
    device: str
    dtype: str | None
    weights: str | None
    activations: str
    kv_dtype: str
    int8_products: bool
    max_context: str | None
    kv_cache_bytes: str | None
    cache_dir: Path | None = None
    cache_dir_bytes: str | None = None
    packed_dir: Path | None = None
    no_packed_dir: bool = False
    packed_dir_bytes: str | None = None
    pipeline_parallel: int = 1
    tensor_parallel: int = 1
    rank_timeout: float = 60
    trust_network: bool = False

    def enter_ranks(self, *, end_seconds: float = 5, **engine: Any) -> None:
        """Become as many processes as are asked for; only the first one of them returns from here, and the only one.

        Args:
            end_seconds: that the processes may take to end after a signal.
            engine: as in `load`.
        """
        size = self.pipeline_parallel * self.tensor_parallel
        if size == 1:
            return
        from latentkv.parallel.process import is_driver, world_size

        if world_size() == 1:
            from latentkv.parallel.launch import launch

            raise typer.Exit(launch(size, sys.argv[1:], end_seconds=end_seconds))
        if not is_driver():
            logging.basicConfig(level=logging.INFO, format="%(message)s")
            self.load(**engine)

    def load(self, **engine: Any) -> LLM:
        """Load it, saying so on a terminal while it lasts; `engine` are further arguments of `LLM`."""
        with status(f"Loading {self.model or 'the small model in this package'}"):
            from latentkv import LLM
            from latentkv.llm import CACHE_DIR_BYTES
            from latentkv.plan import as_kv_format
            from latentkv.plan.sizes import parse_bytes, parse_tokens

            return LLM(
                self.model,
                device=self.device,
                dtype=self.dtype,
                weights=self.weights,
                activations=self.activations,
                kv_dtype="auto" if self.kv_dtype == "auto" else as_kv_format(self.kv_dtype),
                int8_products=self.int8_products,
                max_context=None if self.max_context is None else parse_tokens(self.max_context),
                kv_cache_bytes=None if self.kv_cache_bytes is None else parse_bytes(self.kv_cache_bytes),
                cache_dir=self.cache_dir,
                cache_dir_bytes=CACHE_DIR_BYTES if self.cache_dir_bytes is None else parse_bytes(self.cache_dir_bytes),
                **packed_options(self.packed_dir, self.no_packed_dir, self.packed_dir_bytes),
                pipeline_parallel=self.pipeline_parallel,
                tensor_parallel=self.tensor_parallel,
                rank_timeout=self.rank_timeout,
                trust_network=self.trust_network,
                **engine,
            )


def packed_options(folder: Path | None, without: bool, most: str | None) -> dict[str, Any]:
    """What `LLM` takes for --packed-dir, --no-packed-dir and --packed-dir-bytes.

    Raises:
        ConfigError: they exclude each other.
    """
    from latentkv.plan.sizes import parse_bytes

    if without and (folder is not None or most is not None):
        raise ConfigError("--no-packed-dir excludes --packed-dir and --packed-dir-bytes: choose.")
    return {
        "packed_dir": None if without else "auto" if folder is None else folder,
        "packed_dir_bytes": None if most is None else parse_bytes(most),
    }


def cache_summary(llm: LLM) -> str:
    """What the cache of a loaded model costs a token and how much it holds, for one line."""
    from latentkv.plan import mha_bytes
    from latentkv.plan.sizes import format_bytes
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
    from latentkv.plan.sizes import format_bytes

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
