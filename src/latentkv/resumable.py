"""`ResumableFolder`: a folder that long work is written to step by step; interrupted, the same work goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from latentkv.errors import CheckpointError, LatentKVError
from latentkv.files import lock, sync, write_json
from latentkv.json_files import read_any_json, read_json
from latentkv.saved_values import saved_in

T = TypeVar("T")

_CLAIM = "conversion.json"


class ResumableFolder:
    """A folder that belongs to one piece of work, which its fingerprint tells from every other.

    Until the end it has a folder of its own inside, whose first file holds the fingerprint (`claimed`) and others what
    steps found out (`step`). What makes the whole readable is written last (`finish`), beside a report with the
    fingerprint, by which the same work is known as finished.

    Args:
        path: of the folder; it is made if need be.
        state: name of the folder inside.
        report: name of the report, a JSON object with the fingerprint as "fingerprint".
        last: name of the file that is written last.
        what: is written there, for sentences.

    Attributes:
        remedy: what to do about a damaged file, to end a sentence with.
    """

    def __init__(self, path: Path, *, state: str, report: str, last: str, what: str) -> None:
        self.path, self.state = path, path / state
        self._report, self._last = path / report, path / last
        self._what = what
        self.remedy = f"remove the folder of the {what}, and the same command begins again"

    def require_free(self) -> None:
        """Raise `CheckpointError` unless it is new, empty, or holds such work, whichever that is."""
        if not ((self.state / _CLAIM).is_file() or self._is_finished()):
            self._require_empty()

    def finished(self, fingerprint: str, read: Callable[[dict[str, Any]], T], shards: Iterable[str] = ()) -> T | None:
        """What `read` makes of the report, where this very work is complete; None where it is not.

        Args:
            fingerprint: of the work.
            read: of the report's other values; what it raises means that they are damaged.
            shards: names of further files that must be there.
        """
        if not self._is_finished() or not all((self.path / name).is_file() for name in shards):
            return None
        found = found_in(self._report, {"fingerprint": fingerprint}, read, CheckpointError, self.remedy)
        if found is not None:
            shutil.rmtree(self.state, ignore_errors=True)
        return found

    @contextmanager
    def claimed(self, fingerprint: str) -> Generator[None]:
        """Make the folder this work's own; refuse one that is another's. A disk that is full is one sentence.

        Raises:
            CheckpointError: it holds something else, or other work; another process writes to it; its state is damaged;
                it cannot be written.
        """
        claim = self.state / _CLAIM
        try:
            self.require_free()
            self.path.mkdir(parents=True, exist_ok=True)
            with alone_in(self.path, CheckpointError):
                if not claim.is_file():
                    self._require_empty()
                    self.state.mkdir(exist_ok=True)
                    write_json(claim, fingerprint)
                if self._read(claim, lambda claimed: claimed != fingerprint):
                    raise CheckpointError(
                        f"{self.path} holds an unfinished {self._what} of another source, or with other options: "
                        "remove it first"
                    )
                yield
        except OSError as problem:
            raise CheckpointError(
                f"{self.path} cannot be written ({problem.strerror or problem}): what is finished stays, the same "
                "command goes on"
            ) from problem

    def step(self, name: str, make: Callable[[], object], read: Callable[[Any], T], *, remedy: str | None = None) -> T:
        """What a step found out: it is taken only once, and then read from its file.

        Args:
            name: of the file.
            make: takes the step; what it gives, as JSON can hold it, is written once its other files are.
            read: of the JSON; what it raises means that the file is damaged.
            remedy: what to do about that, instead of beginning again.
        """
        path = self.state / name
        if not path.exists():
            write_json(path, make())
        return self._read(path, read, remedy)

    def finish(self, config: Mapping[str, Any]) -> None:
        """Write the last file, once all others are there; the state is needed no longer."""
        write_json(self._last, config)
        if os.name == "posix":
            sync(self.path)
        shutil.rmtree(self.state, ignore_errors=True)

    def _is_finished(self) -> bool:
        return self._report.is_file() and self._last.is_file()

    def _require_empty(self) -> None:
        if self.path.exists() and (not self.path.is_dir() or any(each != self.state for each in self.path.iterdir())):
            raise CheckpointError(f"{self.path} exists and is not empty: name a new folder for the {self._what}")

    def _read(self, path: Path, read: Callable[[Any], T], remedy: str | None = None) -> T:
        remedy = remedy or self.remedy
        with saved_in(path, CheckpointError, remedy):
            return read(read_any_json(path, CheckpointError, remedy=remedy))


@contextmanager
def alone_in(folder: Path, error: type[LatentKVError]) -> Generator[None]:
    """Write to a folder, which must exist, as no other process that asks so does meanwhile.

    Raises:
        LatentKVError: of type `error`: another process does.
    """
    if os.name != "posix":  # only there a folder can be opened, and locked
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not lock(descriptor, otherwise=True):
            raise error(f"{folder} is being written by another process: wait for its end")
        yield
    finally:
        os.close(descriptor)


def found_in(
    path: Path,
    identity: Mapping[str, object],
    read: Callable[[dict[str, Any]], T],
    error: type[LatentKVError],
    remedy: str,
) -> T | None:
    """What a file says of finished work, if it is this very work's; None where it has to be done, or done again.

    Args:
        path: of a JSON object.
        identity: the values in it that tell the work from others.
        read: of the object's other values; what it raises means that they are damaged.
        error: the type that is raised then.
        remedy: what to do about it, to end the sentence with.
    """
    if not path.is_file():
        return None
    with saved_in(path, error, remedy):
        content = read_json(path, error, remedy=remedy)
        if any(content.pop(key, None) != value for key, value in identity.items()):
            return None
        return read(content)
