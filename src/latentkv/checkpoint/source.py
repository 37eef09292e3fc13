"""Where a model lies: a local folder, or a Hugging Face repository that is fetched once."""

from __future__ import annotations

import re
from pathlib import Path

from latentkv.errors import ConfigError

_WANTED = [
    "*.safetensors",
    "*.json",
    "*.model",
    "tokenizer.model.v[0-9]",
    "*.tiktoken",
    "*.jinja",
    "merges.txt",
    "vocab.txt",
]
# Second copies of the same weights in other layouts, which some repositories carry.
_UNWANTED = ["consolidated*", "original/*", "onnx/*"]
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SECONDS_TO_ANSWER = 10


def resolve_model(name_or_path: str | Path) -> Path:
    """The folder of a model.

    Args:
        name_or_path: a local folder, or a repository of the Hugging Face hub (`org/name`), which is downloaded with a
            progress bar (weights as safetensors, config, tokenizer and chat template; nothing that runs) and kept in
            the hub's own cache.

    Raises:
        ConfigError: neither a folder nor a repository that could be fetched.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConfigError(f"{folder} is a file: name the folder that holds config.json and the weights")
    name = str(name_or_path)
    if not _REPO_ID.fullmatch(name):
        raise ConfigError(f"no folder {name}: name an existing folder, or a Hugging Face repository as org/name")
    return _fetch(name)


def _fetch(repo_id: str) -> Path:
    # Imported here: it is slow to import, and a local folder needs none of it.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        path = snapshot_download(
            repo_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, etag_timeout=_SECONDS_TO_ANSWER
        )
    except GatedRepoError as error:
        reason = "its owner asks you to accept terms on its page, then log in with `hf auth login`"
        raise _not_found(repo_id, reason) from error
    except RepositoryNotFoundError as error:
        raise _not_found(repo_id, "the hub has no such public repository") from error
    except LocalEntryNotFoundError as error:
        offline = constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} cannot be reached"
        raise _not_found(repo_id, f"{reason} and no copy is on this machine") from error
    except Exception as error:  # The hub's client raises errors of its HTTP library, of the disk and its own.
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _not_found(repo_id, first_line) from error
    return Path(path)


def _not_found(name: str, reason: str) -> ConfigError:
    return ConfigError(f"no folder {name}, and no repo {name} could be fetched: {reason}")
