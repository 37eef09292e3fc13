"""The file of requests: read and checked as a whole, before anything that takes long."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from latentkv.errors import RequestError
from latentkv.files import read_bytes
from latentkv.json_files import parse_json

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
"""What a request may ask for."""

MAX_BYTES = 1 << 30
"""Size limit of a file of requests; it is held in memory."""


@dataclass(frozen=True)
class BatchRequest:
    """One line of the file.

    Attributes:
        custom_id: what its author calls it; no two have the same.
        url: one of `URLS`.
        body: JSON, what the server would be sent.
        streams: whether it asks for a stream, which a file cannot hold.
    """

    custom_id: str
    url: str
    body: bytes
    streams: bool

    @property
    def id(self) -> str:
        """What its answer is called: the same for the same request, and no other."""
        asked = "\0".join((self.custom_id, self.url)).encode() + b"\0" + self.body
        return f"batch_req_{sha256(asked).hexdigest()[:32]}"


def read_requests(path: Path) -> dict[str, BatchRequest]:
    """The requests of a file, by `custom_id`, in its order; lines without text are passed over.

    Raises:
        RequestError: the file cannot be read or holds no request, or a line, which is named by its number, is no JSON
            object, lacks something, asks for what no batch can, or has the `custom_id` of another.
    """
    found: dict[str, BatchRequest] = {}
    line_of: dict[str, int] = {}
    for number, line in enumerate(read_bytes(path, RequestError, MAX_BYTES).split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number},"
        request = _read_request(parse_json(line, where, RequestError, remedy="correct the line"), where)
        first = line_of.setdefault(request.custom_id, number)
        if first != number:
            raise RequestError(
                f"{where} has the custom_id {request.custom_id!r} of line {first}: give each request its own."
            )
        found[request.custom_id] = request
    if not found:
        raise RequestError(
            f"{path} holds no request: write one a line, as "
            '{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}.'
        )
    return found


def _read_request(line: Any, where: str) -> BatchRequest:
    if not isinstance(line, dict):
        raise RequestError(f"{where} is no JSON object: write custom_id, method, url and body.")
    fields = cast("dict[str, Any]", line)
    for name in ("custom_id", "method", "url", "body"):
        if name not in fields:
            raise RequestError(f"{where} has no {name}: add it.")
    custom_id, method, url, body = (fields[name] for name in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not custom_id:
        raise RequestError(f"{where} has a custom_id that is no text: give the request a name of its own.")
    if method != "POST":
        raise RequestError(f'{where} has the method {_shown(method)}: write "POST".')
    if url not in URLS:
        raise RequestError(f"{where} asks {_shown(url)}, which no batch can: ask {', '.join(URLS[:-1])} or {URLS[-1]}.")
    if not isinstance(body, dict):
        raise RequestError(f"{where} has a body that is no JSON object: write what the server would be sent.")
    asked = cast("dict[str, Any]", body)
    streams = asked.get("stream") not in (None, False)
    return BatchRequest(custom_id, url, json.dumps(asked, ensure_ascii=False).encode(), streams)


def _shown(value: object) -> str:
    return repr(value)[:80]
