"""What the hub's cache on this machine holds that can be run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from latentkv.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, CachedRevisionInfo, HFCacheInfo


@dataclass(frozen=True)
class CachedModel:
    """A model in the cache.

    Attributes:
        name: of its repository: org/name, or org/name@revision where that is not the main one.
        path: its folder, or its GGUF file.
        model_type: its family, as its config calls it.
        weights: how they are stored.
        bytes: that it takes on the disk.
        last_used: when a file of it was last read, in seconds since 1970.
    """

    name: str
    path: str
    model_type: str
    weights: str
    bytes: int
    last_used: float


def scan(folder: Path) -> HFCacheInfo | None:
    """What a cache folder holds; None where there is none.

    Raises:
        ConfigError: it is a file, or cannot be read.
    """
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        return scan_cache_dir(folder)
    except CacheNotFound:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"The hub's cache {folder} cannot be read ({error}): set HF_HUB_CACHE.") from error


def model_repositories(found: HFCacheInfo | None) -> list[CachedRepoInfo]:
    """The repositories that may be models, by name."""
    return (
        sorted((repo for repo in found.repos if repo.repo_type == "model"), key=lambda repo: repo.repo_id)
        if found
        else []
    )


def runnable(repo: CachedRepoInfo) -> Iterator[CachedModel]:
    """The models of a repository that can be run: those of a kind that is read, and whole."""
    for revision in sorted(repo.revisions, key=lambda each: revision_name(repo, each)):
        name = revision_name(repo, revision)
        for path in _models_in(revision.snapshot_path, (file.file_path for file in revision.files)):
            if (kind := _kind(path)) is None:
                continue
            own = [file for file in revision.files if path.is_dir() or file.file_path in _parts(path)]
            used = max((file.blob_last_accessed for file in own), default=repo.last_accessed)
            yield CachedModel(name, str(path), *kind, sum(file.size_on_disk for file in own), used)


def revision_name(repo: CachedRepoInfo, revision: CachedRevisionInfo) -> str:
    """What every command takes for a revision of a repository."""
    if "main" in revision.refs:
        return repo.repo_id
    return f"{repo.repo_id}@{min(revision.refs, default=revision.commit_hash)}"


def _models_in(snapshot: Path, files: Iterable[Path]) -> Iterator[Path]:
    """The folder, if it is a model, and the GGUF files in it, each of which is one."""
    from latentkv.checkpoint.locate import holds_weights

    if holds_weights(snapshot):
        yield snapshot
    for path in sorted(files):
        if path.suffix == ".gguf" and path == _parts(path)[0]:
            yield path


def _parts(path: Path) -> list[Path]:
    from latentkv.weights.gguf.container import part_paths

    return part_paths(path)


def _kind(path: Path) -> tuple[str, str] | None:
    """The family of a model, and how its weights are stored; None where it cannot be run.

    Of a folder no weights are opened: that would count as a use of them.
    """
    from latentkv.checkpoint.locate import SINGLE_FILE, locate_tensors
    from latentkv.models.config_reader import read_config
    from latentkv.models.parameters import checkpoint_dtype
    from latentkv.models.stored_config import open_checkpoint

    try:
        if path.is_dir():
            config = read_config(path)
            if not (path / SINGLE_FILE).is_file():
                locate_tensors(path)
            return config.model_type, checkpoint_dtype(config)
        config, tensors = open_checkpoint(path)
    except (ConfigError, CheckpointError):
        return None
    return config.model_type, tensors.shown_dtype(max(tensors.names, key=tensors.nbytes))
