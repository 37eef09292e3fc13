"""What a person asks of `LLM` and of the commands that run one: each option said once, with its help.

A field's name, type, default and docstring are the option of the command line (`cli.flags`) as well as the keyword
argument of `LLM`. Nothing heavy is imported here, so that `--help` is instant.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from latentkv.option_types import Bytes, Flag, KVDtype, Tokens
from latentkv.ranges import Range

if TYPE_CHECKING:
    from torch import device as Device
    from torch import dtype as DType
else:
    Device = DType = object

Draft = Literal["auto", "ngram", "mtp"]

Count = Annotated[int, Range(1, 1024, whole=True)]


@dataclass(frozen=True)
class ModelName:
    """Which model; `checkpoint.source` reads it.

    Attributes:
        model: a folder, its config.json, a .gguf file, or a repo id, also as org/name@revision; None is the small model
            in this package.
    """

    model: Annotated[str | Path | None, Flag(("--model", "-m"), read=str)] = None


@dataclass(frozen=True)
class ModelOptions(ModelName):
    """How a model is loaded, and what computes.

    Attributes:
        device: where it runs: cpu, or cuda (cuda:1) where there is an NVIDIA GPU.
        dtype: dtype of weights and activations: bf16, fp16 or fp32, or auto, the checkpoint's; None is auto.
        weights: quantise the large matrices as they are read: int8 or int4; None is as the checkpoint stores them.
        lora: folder of a LoRA adapter as PEFT writes it, merged into the weights as they are read; None is no adapter.
        activations: how they meet quantised weights: exact, or rounded to 8 bits by int8, which is faster and less
            exact.
        threads: CPU threads that compute; None is all cores.
        packed_dir: folder where packed weights are kept, which the next start maps; None keeps
            nothing for the next start; "auto" is ~/.cache/latentkv/packed.
        packed_dir_bytes: size that the files there may take; None is half of what its disk has free.
        generation_config: where the defaults of sampling come from: auto (the model's generation_config.json), none, or
            a folder with such a file.
    """

    _: KW_ONLY
    device: str | Device = "cpu"
    dtype: str | DType | None = None
    weights: str | None = None
    lora: str | Path | None = None
    activations: str = "exact"
    threads: Count | None = None
    packed_dir: Annotated[str | Path | None, Flag(without="--no-packed-dir")] = "auto"
    packed_dir_bytes: Bytes | None = None
    generation_config: str | Path = "auto"


@dataclass(frozen=True)
class CacheOptions:
    """How the model remembers what it has read.

    Attributes:
        max_context: tokens that a prompt and its answer have together at most, like 4096 or 32k; None is the model's
            longest.
        kv_dtype: how the cache stores tokens: bf16, fp8, int8, fp16, fp32, or auto, which is that of the weights.
        int8_products: decode over an int8 cache in int8 products (AVX-512 VNNI): faster at depth, less exact.
        kv_cache_bytes: size of the KV cache, like 2GiB; None is one full context, or half of the free memory if less.
        cache_dir: folder where the state of prompts is kept and found again; it holds what was prompted; None is in
            memory only.
        cache_dir_bytes: size that the files there may take, like 50GiB.
    """

    _: KW_ONLY
    max_context: Annotated[Tokens | None, Flag(("--max-context", "-c", "--ctx-size", "--max-model-len"))] = None
    kv_dtype: KVDtype = "auto"
    int8_products: bool = False
    kv_cache_bytes: Bytes | None = None
    cache_dir: str | Path | None = None
    cache_dir_bytes: Bytes = 10 << 30


@dataclass(frozen=True)
class SpeculationOptions:
    """Tokens that are guessed and then checked together; the answers stay the same.

    Attributes:
        speculate: draft this many tokens at most, where it seems to pay; 0 drafts none.
        draft: what drafts: ngram (the text so far), mtp (the model's module for it), or auto, the better one of both.
    """

    _: KW_ONLY
    speculate: Annotated[int, Range(0, 16, whole=True)] = 0
    draft: Draft = "auto"


@dataclass(frozen=True)
class SchedulerOptions:
    """What shares a step of the engine.

    Attributes:
        max_running: requests that take part in a step at most; the others wait.
        step_seconds: time that one step should take, about; None is as long as it takes.
    """

    _: KW_ONLY
    max_running: Annotated[Count, Flag(("--max-running", "--max-num-seqs"))] = 256
    step_seconds: Annotated[float | None, Flag(offered=False)] = None


@dataclass(frozen=True)
class ParallelOptions:
    """Several processes that run one model.

    Attributes:
        pipeline_parallel: processes that run the model together, each with its own layers; over several machines by
            torchrun.
        tensor_parallel: processes of one machine that work on each layer together, each with its own heads and width of
            experts; with both options there are `pipeline_parallel` times as many.
        rank_timeout: seconds without a word of one of them after which it is given up.
        trust_network: let them talk over addresses that are not private, in the clear.
    """

    _: KW_ONLY
    pipeline_parallel: Annotated[Count, Flag(("--pipeline-parallel", "--pipeline-parallel-size"))] = 1
    tensor_parallel: Annotated[Count, Flag(("--tensor-parallel", "--tensor-parallel-size"))] = 1
    rank_timeout: Annotated[float, Range(2, 86400)] = 60
    trust_network: bool = False

    @property
    def num_ranks(self) -> int:
        """Processes that run the model together."""
        return self.pipeline_parallel * self.tensor_parallel


@dataclass(frozen=True)
class LLMOptions(ParallelOptions, SchedulerOptions, SpeculationOptions, CacheOptions, ModelOptions):
    """All of them: the arguments of `LLM`."""
