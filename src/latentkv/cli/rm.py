"""`latentkv rm`: a repository out of the hub's cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from latentkv.cli.terminal import note
from latentkv.errors import ConfigError
from latentkv.option_types import Flag


def rm(
    name: Annotated[str, Flag(metavar="ORG/NAME")], /, *, yes: Annotated[bool, Flag(("--yes", "-y"))] = False
) -> None:
    """Remove a model from the Hugging Face hub's cache, all of its revisions or the one that is named.

    Files that other revisions share stay.

    Args:
        name: a repository, also as org/name@revision (a branch, a tag or a commit).
        yes: do not ask.
    """
    from latentkv.checkpoint.hub import cache_folder, split_revision
    from latentkv.cli.cached_models import model_repositories, scan
    from latentkv.sizes import format_bytes

    folder, (repo_id, revision) = cache_folder(), split_revision(name)
    found = scan(folder)
    named = frozenset(each for each in model_repositories(found) if each.repo_id == repo_id)
    commits = [
        each.commit_hash
        for repository in named
        for each in repository.revisions
        if revision is None or revision in each.refs or revision == each.commit_hash
    ]
    if found is None or not commits:
        raise ConfigError(f"{folder} holds no {name}: latentkv list shows what it holds.")
    # Of this repository alone: a copy of it under another name may have the same commits.
    strategy = replace(found, repos=named).delete_revisions(*commits)
    size = format_bytes(strategy.expected_freed_size)
    if not yes and not typer.confirm(f"Remove {name} from {folder}, {size}?", err=True):
        note("nothing was removed")
        raise typer.Exit(1)
    strategy.execute()
    note(f"removed {name}: {size} are free")
