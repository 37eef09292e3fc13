"""The file of answers: each is on disk as a whole line when it is there, and a later run goes on after the last one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from latentkv.batch.requests import BatchRequest
from latentkv.errors import RequestError
from latentkv.files import lock
from latentkv.json_files import parse_json
from latentkv.targets import require_folder

_BEGIN = b'{"id": "batch_req_'
"""Of every line: a last line that was cut off is ours if it begins so, as far as it goes."""
_REMEDY = "name another file for the answers, or remove this one"


@dataclass
class Answered:
    """What a file of answers holds.

    Attributes:
        custom_ids: of the requests that are answered.
        failed: how many of them were refused or failed.
        whole_bytes: up to the end of the last whole line.
        all_bytes: with what was cut off after it.
    """

    custom_ids: set[str] = field(default_factory=set[str])
    failed: int = 0
    whole_bytes: int = 0
    all_bytes: int = 0


def read_answers(path: Path, requests: Mapping[str, BatchRequest], *, asked_in: Path) -> Answered:
    """What a file holds of the answers to `requests`; nothing is changed. A last line that was cut off is not counted.

    Args:
        path: of the file, which may not exist yet.
        requests: that are to be answered, by `custom_id`.
        asked_in: the file that they are from.

    Raises:
        RequestError: it cannot be written, is `asked_in` itself, or holds something else than such answers.
    """
    answered = Answered()
    if path.exists() and not path.is_file():
        raise RequestError(f"{path} is no regular file: {_REMEDY}.")
    if not path.exists():
        require_folder(path.parent, RequestError)
        return answered
    if path.samefile(asked_in):
        raise RequestError(f"{path} is the file of the requests: name another one for the answers.")
    if not os.access(path, os.R_OK | os.W_OK):
        raise RequestError(f"{path} may not be read and written: {_REMEDY}.")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            answered.all_bytes += len(line)
            if not line.endswith(b"\n"):
                if not (line.startswith(_BEGIN) or _BEGIN.startswith(line)):
                    raise RequestError(f"{path} ends with something else than an answer: {_REMEDY}.")
                break
            where = f"{path}, line {number},"
            custom_id, failed = _read_answer(parse_json(line, where, RequestError, remedy=_REMEDY), requests, where)
            if custom_id in answered.custom_ids:
                raise RequestError(f"{where} answers {custom_id!r} for the second time: {_REMEDY}.")
            answered.custom_ids.add(custom_id)
            answered.failed += failed
            answered.whole_bytes += len(line)
    return answered


def _read_answer(line: Any, requests: Mapping[str, BatchRequest], where: str) -> tuple[str, bool]:
    """The `custom_id` of a line, and whether its request failed."""
    fields = cast("dict[str, Any]", line if isinstance(line, dict) else {})
    custom_id, response = fields.get("custom_id"), fields.get("response")
    status = cast("dict[str, Any]", response).get("status_code") if isinstance(response, dict) else None
    if not isinstance(custom_id, str) or type(status) is not int:
        raise RequestError(f"{where} is no answer of a batch: {_REMEDY}.")
    request = requests.get(custom_id)
    if request is None:
        raise RequestError(f"{where} answers {custom_id[:80]!r}, which the requests do not ask: {_REMEDY}.")
    if fields.get("id") != request.id:
        raise RequestError(f"{where} answers another request than that which is now called {custom_id!r}: {_REMEDY}.")
    return custom_id, status != 200


class AnswerFile:
    """A file that answers are added to, by this process alone.

    Args:
        path: of the file; it is made where it does not exist.
        answered: what it held when it was read; what was cut off there is removed.

    Raises:
        RequestError: another process adds to it, or has since it was read.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, answered: Answered) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        if not lock(self._file.fileno(), otherwise=True) or self._file.tell() != answered.all_bytes:
            self._file.close()
            raise RequestError(f"{path} is written by another run: wait for its end, or name another file.")
        self._file.truncate(answered.whole_bytes)

    def add(self, request: BatchRequest, status: int, request_id: str, body: object) -> None:
        """Write one answer.

        Args:
            request: that is answered.
            status: of HTTP.
            request_id: that the server gave it.
            body: JSON, what was answered.
        """
        response = {"status_code": status, "request_id": request_id, "body": body}
        line = {"id": request.id, "custom_id": request.custom_id, "response": response, "error": None}
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Wait until all of it is on disk; more than once does no harm."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()
