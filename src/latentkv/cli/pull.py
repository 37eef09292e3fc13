"""`latentkv pull`: a model from the hub, once it is known to run here."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

from latentkv.cli.terminal import console, note, status
from latentkv.errors import ConfigError
from latentkv.option_types import Flag

if TYPE_CHECKING:
    from latentkv.checkpoint.hub import Repository
    from latentkv.plan import Memory

SMALLER = ("int8", "int4")
"""What weights can be made as they are read, from the largest."""


def pull(
    name: Annotated[str, Flag(metavar="ORG/NAME")],
    /,
    *,
    file: str | None = None,
    force: bool = False,
) -> None:
    """Fetch a model from the Hugging Face hub, after a look at whether it can run here.

    Only what is read of a model is fetched: safetensors, config, tokenizer and chat template, nothing that runs. It
    goes into the hub's own cache (HF_HUB_CACHE), where every command finds it by its name; an interrupted download goes
    on.

    Example: latentkv pull org/name

    Args:
        name: a repository, also as org/name@revision (a branch, a tag or a commit).
        file: fetch this .gguf file of the repository instead of safetensors; of a split one any part.
        force: fetch what cannot run here, too.
    """
    from latentkv.checkpoint.hub import MODEL_FILES, cache_folder, fetch, look_at
    from latentkv.checkpoint.source import require_repository
    from latentkv.sizes import format_bytes

    require_repository(name)
    with status(f"Looking at {name}"):
        found = look_at(name)
    patterns = MODEL_FILES if file is None else _parts(found, file)
    wanted = found.wanted(patterns)
    if file is None and not any(each.endswith(".safetensors") for each in wanted):
        raise ConfigError(_no_weights(found))
    missing = found.missing_bytes(wanted)
    here = f", {format_bytes(missing)} of them still to fetch" if missing < sum(wanted.values()) else ""
    note(f"{name}: {len(wanted)} files of {format_bytes(sum(wanted.values()))}{here}")
    reasons = _why_no_model(name) if file is None else _why_too_large(sum(wanted.values()))
    if missing > (free := _free_bytes(cache_folder())):
        reasons.append(
            f"it takes {format_bytes(missing)} of disk, and {cache_folder()} has {format_bytes(free)} left "
            "(HF_HUB_CACHE names another folder)"
        )
    if reasons and not force:
        raise ConfigError(
            f"{name} cannot run here: {'; '.join(reasons)}. Its weights were not fetched; --force fetches them."
        )
    folder = fetch(name, patterns)
    path = folder if file is None else folder / patterns[0]
    note(f"run it: latentkv chat -m {name if file is None else path}")
    print(path)


def _parts(found: Repository, file: str) -> tuple[str, ...]:
    """The files of a GGUF model of which one is named.

    Raises:
        ConfigError: the repository lacks one of them.
    """
    from latentkv.weights.gguf.container import part_paths

    parts = tuple(PurePosixPath(part).as_posix() for part in part_paths(Path(file)))
    for part in parts:
        if part not in found.sizes or not part.endswith(".gguf"):
            raise ConfigError(f"{found.name} has no GGUF file {part}: {_gguf_files(found) or 'it has none'}.")
    return parts


def _gguf_files(found: Repository) -> str:
    files = sorted(name for name in found.sizes if name.endswith(".gguf"))
    return f"choose by --file one of {', '.join(files)}" if files else ""


def _no_weights(found: Repository) -> str:
    choice = _gguf_files(found) or "LatentKV reads no other weights, so name another repository"
    return f"{found.name} has no safetensors: {choice}."


def _why_no_model(name: str) -> list[str]:
    """Why a model cannot run here by its config, which is fetched; its plan is shown if it can be made."""
    from latentkv.checkpoint.source import resolve_config
    from latentkv.cli.plan import verdict
    from latentkv.models.config_reader import read_config
    from latentkv.models.parameters import checkpoint_dtype
    from latentkv.plan import machine_memory, make_plan
    from latentkv.sizes import format_bytes, format_count

    try:
        config = read_config(resolve_config(name))
    except ConfigError as error:
        return [str(error).rstrip(".")]
    room, dtype = machine_memory(), checkpoint_dtype(config)
    dtype = "bf16" if dtype == "fp8" else dtype  # which it is unpacked to
    dtypes = (dtype, *(SMALLER if dtype in ("fp32", "bf16", "fp16") else ()))
    plans = [make_plan(name, config, memory=room, weights_dtype=dtype) for dtype in dtypes]
    stored = plans[0]
    out = console(stderr=True)
    out.print(
        f"{stored.model_type}, {stored.num_layers} layers, {format_count(stored.parameters)} parameters: "
        f"{format_bytes(stored.weights_bytes)} in {stored.weights_dtype}"
    )
    for memory in room:
        out.print(verdict(stored, memory))
    fitting = [plan for plan in plans if any(plan.cache[0].longest_context[memory.name] for memory in room)]
    if not fitting:
        least = min(plans, key=lambda plan: plan.weights_bytes)
        return [f"its weights take {format_bytes(least.weights_bytes)} even in {least.weights_dtype}, {_largest(room)}"]
    if fitting[0] is not stored:
        smaller = fitting[0]
        out.print(f"With --weights {smaller.weights_dtype} they take {format_bytes(smaller.weights_bytes)}, and fit.")
    return []


def _why_too_large(nbytes: int) -> list[str]:
    from latentkv.plan import machine_memory
    from latentkv.sizes import format_bytes

    room = machine_memory()
    if any(nbytes <= memory.free for memory in room):
        return []
    return [f"its weights take {format_bytes(nbytes)}, {_largest(room)}"]


def _largest(room: Sequence[Memory]) -> str:
    from latentkv.sizes import format_bytes

    largest = max(room, key=lambda memory: memory.free)
    return f"and {largest.name} has {format_bytes(largest.free)} free"


def _free_bytes(folder: Path) -> int:
    """Bytes that the disk of a folder has free, which may not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
