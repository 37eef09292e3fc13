"""Where a model lies: a local folder, its config.json, a GGUF file, or a Hugging Face repository that is fetched once.

Every command and `LLM` take a model in these forms, through the functions here: `resolve_model` where weights are
needed, `resolve_folder` where they must be safetensors, `resolve_config` where the shape is enough. What they give is
read by `checkpoint.tensors.open_tensors`, `models.config_reader.read_config` and `text.load_tokenizer`, and nobody else
asks of what kind it is.
"""

from __future__ import annotations

import re
from pathlib import Path

from latentkv.checkpoint.gguf.tensors import is_gguf
from latentkv.checkpoint.hub import MODEL_FILES, TOKENIZER_FILES, fetch
from latentkv.checkpoint.layouts import why_missing
from latentkv.checkpoint.locate import CONFIG_FILE
from latentkv.errors import ConfigError

_REPO = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>[\w.-]+(/[\w.-]+)*))?")


def resolve_model(model: str | Path) -> Path:
    """The folder of a model with its weights, or its GGUF file.

    Args:
        model: a local folder or the config.json in it; a GGUF file, or any part of a split one; or a repository of the
            Hugging Face hub, `org/name` or `org/name@revision` (a branch, a tag or a commit), which is downloaded with
            a progress bar (weights as safetensors, config, tokenizer and chat template; nothing that runs) and kept in
            the hub's own cache.

    Raises:
        ConfigError: neither a folder nor a repository that could be fetched.
    """
    local = _local(model)
    if local is None:
        return fetch(str(model), MODEL_FILES)
    return local if local.is_dir() or is_gguf(local) else local.parent


def resolve_folder(model: str | Path) -> Path:
    """The folder of a model whose safetensors are read or copied; takes and raises as `resolve_model`.

    Raises:
        ConfigError: it is a GGUF file.
    """
    path = resolve_model(model)
    if is_gguf(path):
        raise ConfigError(
            f"{path} is a GGUF file, which can be run and looked at; here a model's folder with safetensors is needed: "
            "use its original release"
        )
    return path


def resolve_config(model: str | Path) -> Path:
    """What `models.read_config` reads a model's shape from: its folder, or a config file by any name.

    Args:
        model: as `resolve_model` takes it; of a repository no weights are fetched. A JSON file of another name than
            config.json is taken for one.

    Raises:
        ConfigError: as `resolve_model`.
    """
    local = _local(model, any_config=True)
    if local is None:
        return fetch(str(model), (CONFIG_FILE, "generation_config.json"))
    return local if local.is_dir() or local.name != CONFIG_FILE else local.parent


def resolve_tokenizer(model: str | Path) -> Path:
    """Where a model's tokenizer lies; of a repository nothing else is fetched. Raises as `resolve_model`."""
    local = _local(model)
    if local is None:
        return fetch(str(model), TOKENIZER_FILES)
    return local if local.is_dir() or is_gguf(local) else local.parent


def require_repository(model: str) -> None:
    """Refuse what is no name of a repository of the hub, but something on this machine, or nothing.

    Raises:
        ConfigError: it is so.
    """
    if (local := _local(model)) is not None:
        raise ConfigError(
            f"{local} lies on this machine already: name a Hugging Face repository as org/name or org/name@revision"
        )


def local_folder(model: Path) -> Path:
    """The folder of a model that is changed where it lies: itself, or the folder of its config.json.

    Raises:
        ConfigError: no such folder.
    """
    local = _local(model)
    if local is None:
        raise ConfigError(f"no folder {model}: name the local folder of the model")
    if is_gguf(local):
        raise ConfigError(f"{local} is a GGUF file, which is not changed where it lies: name the folder of a model")
    return local if local.is_dir() else local.parent


def model_name(model: str | Path) -> str:
    """What to call a model: its folder's name, or its repository."""
    path = Path(model).expanduser()
    if is_gguf(path):
        return path.stem
    if path.is_file():
        path = path.parent
    return path.resolve().name if path.is_dir() else str(model)


def _local(model: str | Path, *, any_config: bool = False) -> Path | None:
    """The folder or config file that a model is named by; None where it can be a repository only.

    Raises:
        ConfigError: it is neither.
    """
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            return path
        exists, is_link = path.exists(), path.is_symlink()
    except (OSError, ValueError) as error:  # a name too long, a null byte
        raise ConfigError(f"{str(model)[:80]!r} names no folder: {error}") from None
    if exists:
        if path.name == CONFIG_FILE or (any_config and path.suffix == ".json"):
            return path
        if is_gguf(path):
            return path
        raise ConfigError(
            f"{path} is a file: name the folder that holds config.json and the weights, its config.json, or a .gguf"
        )
    if is_link:
        raise ConfigError(why_missing(path) or f"{path} cannot be read")
    if path.name == CONFIG_FILE:
        if path.parent.is_dir():
            return path.parent  # which says what it holds instead
        raise ConfigError(f"no folder {path.parent}, of which {model} is to be the config: name an existing folder")
    if is_gguf(path):
        raise ConfigError(f"no file {model}: name an existing .gguf file, of a split model any of its parts")
    if not _REPO.fullmatch(str(model)):
        raise ConfigError(
            f"no folder {model}: name an existing folder, or a Hugging Face repository as org/name or org/name@revision"
        )
    return None
