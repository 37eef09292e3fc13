"""What a folder or file really holds where it is not a checkpoint that can be read, in one sentence with the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from latentkv.errors import CheckpointError
from latentkv.weights.files import modelopt

ORIGINAL = "use its original release (bf16, or fp8 with weight_scale_inv); `latentkv quantize` makes int8 or int4 of it"
"""What to do about weights in a layout that is not read."""

_MERGE = "name its base model, and this folder by --lora (LLM: lora=), or merge it first (peft: `merge_and_unload`)"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_METHODS: Mapping[str, str] = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "modelopt": "ModelOpt",
    "nvfp4": "NVFP4",
    "mxfp4": "MXFP4",
    "hqq": "HQQ",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "torchao": "torchao",
    "fbgemm_fp8": "FBGEMM float8",
    "auto-round": "AutoRound",
    "bitnet": "BitNet",
    "aqlm": "AQLM",
    "mlx": "MLX",
}
# Files that tools write beside config.json to say how they quantised, which config.json itself may leave out.
_METHOD_FILES: Mapping[str, str] = {
    "hf_quant_config.json": "ModelOpt",
    "quanto_qmap.json": "quanto",
    "quantization_map.json": "quanto",
}
# What gives a layout away in tensors' names, the surest first.
_SIGNS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), layout)
    for pattern, layout in (
        (r"\.(absmax|quant_map|SCB)$|\.quant_state\.", "bitsandbytes"),
        (r"\.weight_scale_2$|\.weight_global_scale$", "NVFP4"),
        (r"\.W_q$", "HQQ"),
        (r"\.(q_invperm|q_group_map|q_scale_max)$", "EXL2"),
        (r"\.(trellis|suh|svh)$", "EXL3"),
        (r"\.weight\._(data|scale|shift|codebook)$", "quanto"),
        (r"\.(tensor_impl|weight_qdata)\b", "torchao"),
        (r"\.(codebooks|codes)$", "AQLM"),
        (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
        (r"_blocks$", "MXFP4"),
        (r"\.biases$", "MLX"),
        (r"\.weight_scale$", "float8 or NVFP4 with scales that are no weight_scale_inv"),
        (r"\.weight_packed$", "compressed-tensors"),
    )
)
_OTHER_NAMES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), layout)
    for pattern, layout in (
        (r"\.switch_mlp\.", "MLX's layout of experts (switch_mlp)"),
        (r"(^|\.)blk\.\d+\.attn_", "GGUF's names"),
        (r"(^|\.)tok_embeddings\.|\.attention\.w[qkvo]\.", "the names of the developer's own code (consolidated)"),
        (r"\.self_attention\.linear_qkv\.|(^|\.)embedding\.word_embeddings\.", "Megatron's names"),
    )
)


def foreign_quantization(quantization: Mapping[str, Any]) -> str | None:
    """The method that a config's `quantization_config` describes, by its name; None for those that are read."""
    named = quantization.get("quant_method") or quantization.get("quant_algo")
    if named in ("fp8", "compressed-tensors", "gptq", "awq"):
        return None
    algorithm = modelopt.algorithm_of(quantization)
    if algorithm in modelopt.ALGORITHMS:
        return None
    if isinstance(named, str):
        shown = _METHODS.get(named.lower(), repr(named))
        return f"{shown} ({algorithm})" if algorithm and algorithm != named else shown
    if algorithm:
        return f"ModelOpt ({algorithm})"
    keys = set(quantization)
    if keys & {"load_in_8bit", "load_in_4bit"} or any(key.startswith(("bnb_", "llm_int8_")) for key in keys):
        return "bitsandbytes"
    if keys & {"desc_act", "damp_percent"}:
        return "GPTQ"
    if keys & {"w_bit", "q_group_size", "zero_point"}:
        return "AWQ"
    if keys >= {"group_size", "bits"}:
        return "MLX"
    if keys & {"weight_block_size", "scale_fmt"}:
        return None  # DeepSeek's float8, by what else it says
    return f"a method that is not named (its keys: {', '.join(sorted(map(str, keys))[:4])})"


def foreign_names(folder: Path, names: Iterable[str]) -> str | None:
    """Why tensors of these names are no checkpoint of this kind; None where they give nothing away."""
    names = tuple(names)
    if name := next((name for name in names if re.search(r"\blora_(A|B|embedding_)", name)), None):
        return f"{folder} holds a LoRA adapter ({name}) and no whole model: {_MERGE}"
    for pattern, layout in _SIGNS:
        if name := next((name for name in names if pattern.search(name)), None):
            method = _noted_method(folder) or layout
            if method.startswith(("GPTQ", "AWQ")):
                return (
                    f"{folder} holds weights quantised by {method} ({name}), but its config.json has no "
                    "quantization_config with quant_method gptq or awq, and no quantize_config.json or "
                    "quant_config.json lies beside it, which says how: use a release that has it"
                )
            return f"{folder} holds weights quantised by {method} ({name}), which is not supported: {ORIGINAL}"
    for pattern, layout in _OTHER_NAMES:
        if name := next((name for name in names if pattern.search(name)), None):
            return f"{folder} holds weights under {layout}, such as {name}: use the release that transformers loads"
    return None


def describe_folder(folder: Path) -> str:
    """What a folder without a readable checkpoint is, and what to do."""
    if not folder.is_dir():
        return why_missing(folder) or f"there is no checkpoint folder {folder}: name an existing one"
    entries = sorted(folder.iterdir())
    if not entries:
        return f"{folder} has no weights, it is an empty folder: name the one that holds config.json and the weights"
    wanted = [path for path in entries if path.suffix in (".safetensors", ".json")]
    return (
        _adapter(folder)
        or next((reason for path in wanted if path.is_symlink() and (reason := why_missing(path))), None)
        or _other_format(folder, entries)
        or _elsewhere(folder, entries)
        or f"{folder} has no weights, only {_listed(path.name for path in entries)}: it needs model.safetensors, or "
        "shards with model.safetensors.index.json"
    )


def why_missing(path: Path) -> str | None:
    """Why a path that is named cannot be read as what it should be; None where nothing is known against it."""
    if path.is_symlink() and not path.exists():
        return (
            f"{path} is a link to {path.readlink()}, which is not there: download the model again, or copy it with its "
            "links followed (`cp -L`)"
        )
    if not path.is_file():  # opening a pipe would wait for ever
        return None
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError:
        return None
    if start == _LFS_POINTER:
        return f"{path} is a git-LFS pointer, not the file: run `git lfs pull` in its folder, or download it again"
    return None


def refuse_missing(path: Path) -> None:
    """Raise `CheckpointError` for a dead link or a git-LFS pointer."""
    if reason := why_missing(path):
        raise CheckpointError(reason)


def _adapter(folder: Path) -> str | None:
    if not any((folder / name).exists() for name in ("adapter_config.json", "adapter_model.safetensors")):
        return None
    if any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        return None
    base = re.search(r'"base_model_name_or_path"\s*:\s*"([^"]{1,200})"', _text(folder / "adapter_config.json"))
    of = f" of {base[1]}" if base else ""
    return f"{folder} holds a LoRA adapter{of} and no whole model: {_MERGE}"


def _other_format(folder: Path, entries: list[Path]) -> str | None:
    names = [path.name for path in entries]

    def first(*endings: str) -> str | None:
        return next((name for name in names if name.endswith(endings)), None)

    if "model_index.json" in names:
        return f"{folder} is a diffusers pipeline, no language model: name the folder of a language model"
    if {"modules.json", "config_sentence_transformers.json"} & set(names):
        return f"{folder} is a sentence-transformers model, which makes no text: name the folder of a language model"
    safetensors = [name for name in names if name.endswith(".safetensors")]
    if safetensors:
        return _loose_safetensors(folder, safetensors)
    if name := first(".gguf"):
        return f"{folder} has no safetensors, but a model in GGUF: name the file itself, {folder / name}"
    if name := first(".bin", ".pt", ".pth", ".ckpt", ".pkl", ".distcp"):
        return (
            f"{folder} has only pickled weights ({name}), which are never loaded: convert to safetensors "
            "(transformers: `from_pretrained`, then `save_pretrained`)"
        )
    if name := first(".h5", ".msgpack", ".onnx", ".npz", ".ot", ".tflite", ".mlmodel"):
        return f"{folder} has no safetensors, only {name}: use the model's release in safetensors"
    return None


def _loose_safetensors(folder: Path, names: list[str]) -> str:
    """Safetensors under names that are neither the one file nor shards of an index."""
    parts = [match for name in names if (match := re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", name))]
    if parts:
        missing = int(parts[0][3]) - len(parts)
        what = f"{len(parts)} of {int(parts[0][3])} shards ({names[0]})"
        lacking = f"the {missing} that are missing and " if missing > 0 else ""
        return f"{folder} has {what} and no model.safetensors.index.json: add the index, download {lacking}it again"
    if any(name.startswith("consolidated") for name in names):
        return (
            f"{folder} has {names[0]}, the layout of the developer's own code: use the release that transformers loads"
        )
    if len(names) == 1:
        return f"{folder} has {names[0]} and no model.safetensors: rename it if it is the whole model, or add the index"
    return f"{folder} has {names[0]} but neither model.safetensors nor model.safetensors.index.json: add the index"


def _elsewhere(folder: Path, entries: list[Path]) -> str | None:
    """A checkpoint that lies deeper: a training run's, a hub cache's."""
    inner = [path.parent for pattern in ("*", "snapshots/*") for path in folder.glob(f"{pattern}/config.json")]
    if not inner or (folder / "config.json").exists():
        return None
    newest = max(inner, key=lambda path: (path / "config.json").lstat().st_mtime)
    return f"{folder} holds no model itself, but {newest} does: name that folder"


def _noted_method(folder: Path) -> str | None:
    """What a tool noted in a file of its own of how it quantised."""
    for name, method in _METHOD_FILES.items():
        if (folder / name).is_file():
            algorithm = re.search(r'"quant_algo"\s*:\s*"(\w{1,40})"', _text(folder / name))
            return f"{method} ({algorithm[1]})" if algorithm else method
    return None


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(100_000)
    except OSError:
        return ""


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
