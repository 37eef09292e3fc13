"""The Hugging Face hub: what a repository holds, what of it is fetched, and what is said when it cannot be.

Its client is imported where it is used: that takes long, and a local folder needs none of it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from latentkv.errors import ConfigError

TOKENIZER_FILES = ("*.json", "*.model", "tokenizer.model.v[0-9]", "*.tiktoken", "*.jinja", "merges.txt", "vocab.txt")
"""Patterns of what may belong to a tokenizer, or says how a model is used."""

MODEL_FILES = ("*.safetensors", *TOKENIZER_FILES)
"""Patterns of what is read of a model."""

# Second copies of the same weights in other layouts, which some repositories carry.
_UNWANTED = ("consolidated*", "original/*", "onnx/*")
_SECONDS_TO_ANSWER = 10


@dataclass(frozen=True)
class Repository:
    """What a repository of the hub holds.

    Attributes:
        name: org/name or org/name@revision.
        commit: that the name means now.
        sizes: bytes of its files, by name.
    """

    name: str
    commit: str
    sizes: Mapping[str, int]

    def wanted(self, patterns: Iterable[str]) -> dict[str, int]:
        """Bytes of the files that `fetch` would fetch for these patterns, by name."""
        from huggingface_hub.utils import filter_repo_objects

        kept = filter_repo_objects(self.sizes, allow_patterns=list(patterns), ignore_patterns=list(_UNWANTED))
        return {name: self.sizes[name] for name in kept}

    def missing_bytes(self, names: Iterable[str]) -> int:
        """Bytes of those of these files that are not on this machine yet."""
        from huggingface_hub import constants, try_to_load_from_cache

        def is_here(name: str) -> bool:
            found = try_to_load_from_cache(
                split_revision(self.name)[0], name, cache_dir=constants.HF_HUB_CACHE, revision=self.commit
            )
            return isinstance(found, str)

        return sum(self.sizes[name] for name in names if not is_here(name))


def split_revision(repo: str) -> tuple[str, str | None]:
    """The id of a repository, and the revision that is named after @, if one is."""
    repo_id, _, revision = repo.partition("@")
    return repo_id, revision or None


def cache_folder() -> Path:
    """Where the hub's client keeps what it has fetched: HF_HUB_CACHE."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def look_at(repo: str) -> Repository:
    """What a repository holds; nothing of it is fetched.

    Args:
        repo: org/name or org/name@revision.

    Raises:
        ConfigError: there is none, or it cannot be reached.
    """
    from huggingface_hub import HfApi

    repo_id, revision = split_revision(repo)
    with _explained(repo):
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=_SECONDS_TO_ANSWER)
        return Repository(
            repo, info.sha or revision or "main", {file.rfilename: file.size or 0 for file in info.siblings or ()}
        )


def fetch(repo: str, wanted: Sequence[str]) -> Path:
    """Fetch files of a repository, with a progress bar, into the hub's own cache; those that are there stay.

    Args:
        repo: org/name or org/name@revision.
        wanted: patterns of their names.

    Returns:
        The folder that they are in.

    Raises:
        ConfigError: it could not be fetched.
    """
    from huggingface_hub import snapshot_download

    repo_id, revision = split_revision(repo)
    with _explained(repo):
        path = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(wanted),
            ignore_patterns=list(_UNWANTED),
            etag_timeout=_SECONDS_TO_ANSWER,
        )
    return Path(path)


@contextmanager
def _explained(repo: str) -> Generator[None]:
    """Whatever the hub's client raises, as one sentence."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        reason = "its owner asks you to accept terms on its page, then log in with `hf auth login`"
        raise _not_found(repo, reason) from error
    except RevisionNotFoundError as error:
        raise _not_found(repo, f"the repository has no revision {split_revision(repo)[1]!r}") from error
    except RepositoryNotFoundError as error:
        raise _not_found(repo, "the hub has no such public repository") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        offline = constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} cannot be reached"
        raise _not_found(repo, f"{reason} and no copy is on this machine") from error
    except Exception as error:  # The hub's client raises errors of its HTTP library, of the disk and its own.
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _not_found(repo, first_line) from error


def _not_found(name: str, reason: str) -> ConfigError:
    return ConfigError(f"no folder {name}, and no repo {name} could be fetched: {reason}")
