"""`BodyRoute`: bodies but short ones are parsed in a thread of their own, so that none holds anybody else up."""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from json import scanner
from typing import Any

import numpy as np
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope

MAX_LISTS = 1 << 15
"""Lists and objects in a body."""
MAX_NAMES = 1 << 16
"""Names of all its objects."""
MAX_VALUES = 1 << 17
"""Values of all its lists and objects."""
MAX_TOKENS = 1 << 20
"""And of those that are token ids."""
MAX_TEXT = 8 << 20
"""Bytes of one text: nobody else runs while it is copied."""

SHORT = 1 << 12
"""Bytes that are parsed in the event loop: it takes less than to wake a thread."""
SMALL = 1 << 16
"""Bytes that the parser written in C reads within some milliseconds, whatever they are. It lets no other thread run, so
what is larger is read by the one written in Python, but for its strings: slower, and nobody waits for it."""
WINDOW = 1 << 20


class BodyRoute(APIRoute):
    """A route whose body is parsed beside the event loop.

    Attributes:
        max_values: that a body may hold.
    """

    max_values = MAX_VALUES

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI's, for a `BodyRequest`."""
        handle, most = super().get_route_handler(), self.max_values

        async def handle_body(request: Request) -> Response:
            return await handle(BodyRequest(request.scope, request.receive, most))

        return handle_body


class TokensRoute(BodyRoute):
    """A route that takes lists of token ids, too."""

    max_values = MAX_TOKENS


class BodyRequest(Request):
    """A request that keeps what its body says, and not its bytes.

    Args:
        scope: as ASGI has it.
        receive: likewise.
        max_values: that the body may hold.
    """

    def __init__(self, scope: Scope, receive: Receive, max_values: int) -> None:
        super().__init__(scope, receive)
        self._max_values = max_values

    async def json(self) -> Any:
        """The body."""
        if not hasattr(self, "_json"):
            body = await self.body()
            if len(body) <= SHORT:
                self._json = parse(body, self._max_values)
            else:
                loop = asyncio.get_running_loop()
                self._json = await loop.run_in_executor(_parsers(), parse, body, self._max_values)
            self._body = b""
        return self._json


@cache
def _parsers() -> ThreadPoolExecutor:
    """One thread: two would wait for each other anyway, and so one body at a time is in memory twice."""
    return ThreadPoolExecutor(1, thread_name_prefix="latentkv-bodies")


def parse(body: bytes, max_values: int = MAX_VALUES) -> Any:
    """What a body of JSON says.

    Raises:
        JSONDecodeError: it is no JSON.
        HTTPException: it holds too much, too deeply, or what is no text.
    """
    try:
        if len(body) <= SMALL:
            return json.loads(body)
        _require_bounded(body, max_values)
        text = _decoded(body)
        decoder: Any = json.JSONDecoder()
        decoder.scan_once = vars(scanner)["py_make_scanner"](decoder)
        return decoder.decode(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise HTTPException(400, "The body's lists and objects nest too deeply: send fewer levels.") from None
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"The body is not valid UTF-8: byte {error.start} cannot be read.") from None
    except ValueError:  # Python reads no integer of more than 4,300 digits
        raise HTTPException(400, "The body holds a number of too many digits: send a smaller one.") from None


def _require_bounded(body: bytes, max_values: int) -> None:
    """Refuse a body with too much of something. What stands in its texts does not count."""
    lists = names = commas = 0
    whole = 0  # bytes of windows that are inside of one text from end to end
    state = escaped = False
    for start in range(0, len(body), WINDOW):
        window = np.frombuffer(body, np.uint8, min(WINDOW, len(body) - start), start)
        quotes = window == ord('"')
        slashes = np.flatnonzero(window == ord("\\"))
        if escaped:
            quotes[0] = False
            slashes = slashes[slashes > 0]
        escaped = False
        if len(slashes):  # of those in a row, every second one is itself escaped
            begins = np.flatnonzero(np.diff(slashes, prepend=-2) != 1)
            nth = np.arange(len(slashes)) - np.repeat(begins, np.diff(begins, append=len(slashes)))
            after = slashes[nth % 2 == 0] + 1
            escaped = bool(after[-1] == len(window))
            quotes[after[: len(after) - escaped]] = False
        inside = np.logical_xor.accumulate(quotes) ^ state
        whole = whole + len(window) if state and not quotes.any() else 0
        if whole > MAX_TEXT:
            raise HTTPException(400, f"The body holds a text of more than {MAX_TEXT >> 20} MiB: send less at once.")
        state = bool(inside[-1])
        outside = window[~inside]
        lists += int(np.count_nonzero((outside | 0x20) == ord("{")))  # [ and { differ in this bit
        names += int(np.count_nonzero(outside == ord(":")))
        commas += int(np.count_nonzero(outside == ord(",")))
        for what, count, most in (
            ("lists and objects", lists, MAX_LISTS),
            ("names", names, MAX_NAMES),
            ("values", commas, max_values),
        ):
            if count > most:
                raise HTTPException(400, f"The body holds more than {most:,} {what}: send less at once.")


def _decoded(body: bytes) -> str:
    decoder = codecs.getincrementaldecoder(json.detect_encoding(body))("surrogatepass")
    parts = [decoder.decode(body[start : start + WINDOW]) for start in range(0, len(body), WINDOW)]
    return "".join([*parts, decoder.decode(b"", final=True)])
