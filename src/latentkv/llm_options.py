"""What a person asks of `LLM`, checked, and what it means for a model."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from latentkv.checkpoint.tensors import Tensors
from latentkv.dtype_names import short_dtype
from latentkv.errors import CacheError, ConfigError
from latentkv.models.config import MLAConfig, ModelConfig
from latentkv.models.decoder import Decoder
from latentkv.models.stored_config import stored_dtype
from latentkv.ops.backends import why_no_int8_products, why_not_native
from latentkv.options import Draft, LLMOptions
from latentkv.ranges import require_range
from latentkv.state import KVFormat
from latentkv.text import Tokenizer, has_tokenizer, load_tokenizer, require_match
from latentkv.weights.packed_folder import PackedFolder

logger = logging.getLogger("latentkv")

PACKED_DIR_VARIABLE = "LATENTKV_PACKED_DIR"
"""Names the folder of packed weights; set to nothing, there is none."""

EMBEDDED_MODEL = Path(__file__).parent / "assets" / "default"

_KV_FORMATS: Mapping[torch.dtype, KVFormat] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_KV_DTYPES: tuple[KVFormat, ...] = ("fp32", "bf16", "fp16", "int8", "fp8")
_CPU = torch.device("cpu")
# An MTP module reads every prompt as well: one layer more, which is to be a small part of the model.
_LAYERS_OF_AUTO_MTP = 16


@dataclass(frozen=True)
class LoadOptions(LLMOptions):
    """What was asked of `LLM`, with device and dtypes found."""

    _: KW_ONLY
    device: torch.device = _CPU
    dtype: torch.dtype | None = None
    lora: Path | None = None

    @classmethod
    def of(cls, asked: LLMOptions) -> LoadOptions:
        """Check what no model is needed for.

        Raises:
            ConfigError: an option is none of its kind, or cannot be had here.
        """
        _require_num_ranks(asked.pipeline_parallel, "pipeline_parallel")
        _require_num_ranks(asked.tensor_parallel, "tensor_parallel")
        _require_rank_timeout(asked.rank_timeout)
        if asked.threads is not None:
            require_range("threads", asked.threads, ConfigError)
        if asked.packed_dir is None and asked.packed_dir_bytes is not None:
            raise ConfigError("packed_dir=None (--no-packed-dir) excludes packed_dir_bytes: leave one of them out.")
        found: dict[str, Any] = {"device": as_device(asked.device), "dtype": as_dtype(asked.dtype)}
        found["kv_dtype"] = short_dtype(asked.kv_dtype)
        found["lora"] = None if asked.lora is None else Path(asked.lora).expanduser()
        return cls(**vars(asked) | found)


def embedded_model() -> Path:
    """The folder of the model inside this package."""
    if not (EMBEDDED_MODEL / "config.json").is_file():
        raise ConfigError("This installation carries no embedded model: name a model folder or a Hugging Face repo id.")
    return EMBEDDED_MODEL


def dtype_to_run(asked: torch.dtype | None, config: ModelConfig, reader: Tensors, device: torch.device) -> torch.dtype:
    """What hidden states are computed in: as asked, else as the checkpoint says.

    The native kernels take no float16, which most GPTQ and AWQ copies name: there bfloat16 keeps the weights quantised,
    where float16 would expand them to four times their size. A warning says so.
    """
    if asked is not None:
        return asked
    stored = stored_dtype(config)
    if stored != torch.float16 or why_not_native(device) or not any(map(reader.is_quantized, reader.names)):
        return stored
    logger.warning(
        "%s names float16, for which the kernels of quantised weights are not made: it runs in bfloat16 "
        "(--dtype fp16 expands the weights instead).",
        reader.folder,
    )
    return torch.bfloat16


def tokenizer_of(folder: Path, config: ModelConfig) -> Tokenizer | None:
    """The tokenizer of a folder, which fits its model; None where it has none."""
    if not has_tokenizer(folder):
        return None
    tokenizer = load_tokenizer(folder)
    require_match(tokenizer, config.vocab_size)
    return tokenizer


def end_ids(config: ModelConfig, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The tokens that end a completion: those that the files name, and what closes a turn in the chat template."""
    named = named_end_ids(config, tokenizer)
    turn_end = None if tokenizer is None else tokenizer.turn_end_id
    return named if turn_end is None or turn_end >= config.vocab_size else named | {turn_end}


def named_end_ids(config: ModelConfig, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The tokens that the files of a model and its tokenizer say to end a text."""
    return frozenset(config.eos_token_ids) | (frozenset() if tokenizer is None else tokenizer.eos_ids)


def default_packed_dir() -> Path | None:
    """Where packed weights are kept unless somebody says where; None: nowhere."""
    named = os.environ.get(PACKED_DIR_VARIABLE)
    if named is not None:
        return Path(named).expanduser() if named else None
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (cache if cache.is_absolute() else Path.home() / ".cache") / "latentkv" / "packed"
    except RuntimeError:  # a user without a home
        return None


def open_packed_folder(asked: str | Path | None, max_bytes: int | None) -> PackedFolder | None:
    """The folder where packed weights are kept; None: none is asked for, or the default one cannot be used.

    Raises:
        CacheError: the folder that was asked for cannot be used.
        ConfigError: `max_bytes` is no number of bytes.
    """
    if max_bytes is not None and (type(max_bytes) is not int or max_bytes < 1):
        raise ConfigError(f"packed_dir_bytes={max_bytes!r} is no number of bytes: give 1 or more, or packed_dir=None.")
    path = default_packed_dir() if asked == "auto" else None if asked is None else Path(asked).expanduser()
    if path is None:
        return None
    try:
        return PackedFolder(path, max_bytes)
    except (OSError, CacheError) as error:
        reason = (
            error
            if isinstance(error, CacheError)
            else (f"packed_dir={str(path)!r} cannot be used ({error.strerror}): name a folder that can be written.")
        )
        if asked != "auto":
            raise CacheError(str(reason)) from error
        logger.warning("No packed weights are kept for the next start: %s", reason)
        return None


def context_of(asked: int | None, config: ModelConfig) -> int:
    """The context as asked, or the model's."""
    if asked is None:
        return config.max_positions
    if type(asked) is not int or not 2 <= asked <= config.max_positions:
        is_dynamic = config.rope.kind == "dynamic"
        beyond = " Its dynamic RoPE would change what cached keys mean beyond that." if is_dynamic else ""
        raise ConfigError(
            f"max_context={asked!r} is not allowed: this model takes 2 to {config.max_positions:,} tokens.{beyond}"
        )
    return asked


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype of weights by any of its names; None is the checkpoint's, as is "auto"."""
    if dtype is None or dtype == "auto" or dtype in _KV_FORMATS:
        return None if isinstance(dtype, str) else dtype
    for known, name in _KV_FORMATS.items():
        if isinstance(dtype, str) and short_dtype(dtype) == name:
            return known
    raise ConfigError(f"dtype={dtype!r} is not supported: choose fp32, bf16 or fp16.")


def as_device(device: str | torch.device) -> torch.device:
    """A device that is there."""
    allowed = "choose cpu, or cuda where there is an NVIDIA GPU"
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(f"device={str(device)!r} cannot be used ({reason}): {allowed}.") from error
    if resolved.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={str(device)!r} is not supported: {allowed}.")
    return resolved


def _require_num_ranks(asked: object, name: str) -> None:
    if type(asked) is not int or asked < 1:
        raise ConfigError(f"{name}={asked!r} is no number of processes: give 1 or more.")


def _require_rank_timeout(asked: object) -> None:
    if isinstance(asked, bool) or not isinstance(asked, int | float) or not 2 <= asked <= 86_400:
        raise ConfigError(f"rank_timeout={asked!r} is not allowed: give 2 to 86,400 seconds.")


def require_int8_products(config: ModelConfig, kv_dtype: str, device: torch.device) -> None:
    """Raise `ConfigError` where the model, the cache or this machine cannot decode in int8 products."""
    reason = why_no_int8_products(device)
    if not isinstance(config.cached_attention, MLAConfig):
        reason = "the model has no latent attention"
    elif kv_dtype != "int8":
        reason = f"it takes kv_dtype='int8', not {kv_dtype!r}"
    if reason is not None:
        raise ConfigError(f"int8_products cannot be had: {reason}. Leave it out, or change that.")


def drafts_by_mtp(draft: str, decoder: Decoder) -> bool:
    """Whether drafts are to come from the MTP module, too."""
    if draft not in get_args(Draft):
        raise ConfigError(f"draft={draft!r} is not supported: choose {', '.join(get_args(Draft))}.")
    if draft == "mtp" and not decoder.mtp:
        raise ConfigError("draft='mtp' needs a multi-token-prediction module, which this model has not: draft='ngram'.")
    if draft == "auto":
        return len(decoder.mtp) > 0 and decoder.config.num_layers >= _LAYERS_OF_AUTO_MTP
    return draft == "mtp"


def kv_format(kv_dtype: str, weights: torch.dtype) -> KVFormat:
    """How the cache stores tokens."""
    if kv_dtype == "auto":
        return _KV_FORMATS[weights]
    if kv_dtype not in _KV_DTYPES:
        raise ConfigError(f"kv_dtype={kv_dtype!r} is not supported: choose auto, {', '.join(_KV_DTYPES)}.")
    return kv_dtype
