"""A server before its model is there, and when there will be none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from latentkv import LLM
from latentkv.errors import CheckpointError, RankError
from latentkv.server.context import Server
from latentkv.server.run import bind, make_server, serve_forever
from latentkv.server.settings import ServerSettings
from live_server import NAME, Live, ask

SETTINGS = ServerSettings(drain_seconds=1)


class Serving:
    """`serve_forever` in a thread; `load` waits for `go`."""

    def __init__(self, load: Callable[[], Server]) -> None:
        self.go, self.ready = threading.Event(), threading.Event()
        self.raised: Exception | None = None
        self.listening = bind("127.0.0.1", 0)
        self.live = Live(f"http://127.0.0.1:{self.listening.getsockname()[1]}", None)  # type: ignore[arg-type]
        self._load = load
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            serve_forever(self.listening, self._when_told, SETTINGS, lambda server: self.ready.set())
        except Exception as error:
            self.raised = error

    def _when_told(self) -> Server:
        assert self.go.wait(60)
        return self._load()


@pytest.fixture(autouse=True)
def own_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log of the tests' process stays as it is."""
    monkeypatch.setattr("latentkv.server.run.log_to_stderr", lambda: None)


@contextmanager
def serving(load: Callable[[], Server]) -> Iterator[Serving]:
    found = Serving(load)
    try:
        yield found
    finally:
        found.go.set()
        found.listening.close()


def test_until_the_model_stands_every_path_says_that_it_is_being_loaded() -> None:
    made: list[Server] = []

    def load() -> Server:
        made.append(make_server(LLM(kv_cache_bytes=1 << 20), NAME, SETTINGS))
        return made[0]

    with serving(load) as waiting:
        status, answer, headers = ask(waiting.live, "/health")
        assert (status, answer["status"]) == (503, "loading") and int(headers["Retry-After"]) > 0
        assert ask(waiting.live, "/health", method="HEAD")[0] == 503
        for path in ("/v1/models", "/v1/chat/completions", "/", "/nowhere"):
            status, answer, headers = ask(waiting.live, path, None if path == "/v1/models" else {"prompt": "x"})
            assert (status, answer["error"]["code"]) == (503, "loading") and headers["Retry-After"]
        assert ask(waiting.live, "/v1/messages", {})[1]["error"]["type"] == "overloaded_error"
        assert isinstance(ask(waiting.live, "/api/tags")[1]["error"], str)
        waiting.go.set()
        assert waiting.ready.wait(60)
        assert ask(waiting.live, "/health")[1]["status"] in ("idle", "working")
        assert ask(waiting.live, "/v1/completions", {"prompt": "It was", "max_tokens": 2})[0] == 200
        made[0].model.thread.die_of(RankError(0, "ends with the test"))
        waiting.thread.join(20)
        assert not waiting.thread.is_alive()


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_error() -> None:
    def load() -> Server:
        raise CheckpointError("model.safetensors is cut off.")

    with serving(load) as waiting:
        assert ask(waiting.live, "/health")[0] == 503
        waiting.go.set()
        waiting.thread.join(20)
        assert isinstance(waiting.raised, CheckpointError)
        with pytest.raises(OSError):
            ask(waiting.live, "/health")
