"""A real server on a free port of this machine, in a thread."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from latentkv import LLM
from latentkv.server.app import create_app
from latentkv.server.context import Server
from latentkv.server.run import bind, make_server, uvicorn_config
from latentkv.server.settings import ServerSettings

NAME = "small"


@dataclass
class Live:
    """A server that answers.

    Attributes:
        url: without a path.
        server: its insides.
    """

    url: str
    server: Server

    @property
    def llm(self) -> LLM:
        return self.server.model.llm

    def wait_until_free(self, seconds: float = 30) -> None:
        """Until no request holds a page."""
        deadline = time.monotonic() + seconds
        pool = self.llm.cache.pool
        while pool.free_pages < pool.num_pages or self.server.model.thread.num_open:
            assert time.monotonic() < deadline, f"{pool.num_pages - pool.free_pages} pages are still held"
            time.sleep(0.01)
        self.llm.cache.check()


@contextmanager
def serving(llm: LLM, *, other_names: tuple[str, ...] = (), **settings: Any) -> Generator[Live]:
    """Serve `llm` while the context lasts; its engine cannot be used again afterwards."""
    server = make_server(llm, NAME, ServerSettings(**{"drain_seconds": 5, **settings}), other_names=other_names)
    listening = bind("127.0.0.1", 0)
    web = uvicorn.Server(uvicorn_config(create_app(server), server.settings))
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not web.started:
        time.sleep(0.005)
    try:
        yield Live(f"http://127.0.0.1:{listening.getsockname()[1]}", server)
    finally:
        web.should_exit = True
        thread.join(timeout=20)
        listening.close()
        assert not thread.is_alive(), "the server did not stop"


def ask(live: Live, path: str, body: object = None, method: str | None = None, **headers: str) -> tuple[int, Any, Any]:
    """(status, JSON or text, headers)."""
    data = None if body is None else json.dumps(body).encode()
    sent = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    request = urllib.request.Request(f"{live.url}{path}", data, sent, method=method)
    try:
        answer = urllib.request.urlopen(request, timeout=20)
    except urllib.error.HTTPError as error:
        answer = error
    text = answer.read().decode()
    is_json = (answer.headers["content-type"] or "").startswith("application/json")
    return answer.status, json.loads(text) if text and is_json else text, answer.headers
