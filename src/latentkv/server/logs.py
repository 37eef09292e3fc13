"""One line of JSON for each request: what was asked of whom, how it went and how long it took. No text of theirs."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Any
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("latentkv.server")

_PLAIN_ID = re.compile(r"[A-Za-z0-9_.\-]{1,128}")


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """As it says."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr() -> None:
    """Write this process's log to stderr, a line of JSON a record: this package's, and warnings of all others."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("latentkv").setLevel(logging.INFO)


MAX_NOTE = 1000
"""Characters of the header that says what was left out."""


class LogRequests:
    """Gives every request an id, takes the client's if it is plain, and logs its end.

    The answer's headers tell the id, and what was left out of what was asked.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI app."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _PLAIN_ID.fullmatch(given) else uuid4().hex
        scope["latentkv.request_id"] = request_id
        # Made here, for what is inside may be given a copy of the scope.
        log: dict[str, Any] = {}
        notes: list[str] = []
        scope["latentkv.log"], scope["latentkv.notes"] = log, notes
        status: int | None = None

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if notes:
                    headers["x-latentkv-note"] = "; ".join(notes)[:MAX_NOTE].encode("unicode_escape").decode()
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            fields = {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(time.monotonic() - began, 4),
                **log,
            }
            level = logging.DEBUG if scope["path"] in ("/health", "/metrics", "/stats") else logging.INFO
            logger.log(level, "request", extra={"fields": fields})
