"""`serve_forever`: a socket, the app behind it, and an honest exit code."""

from __future__ import annotations

import asyncio
import errno
import gc
import math
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from latentkv.errors import ConfigError
from latentkv.llm import LLM
from latentkv.server.app import create_app
from latentkv.server.connection import TimelyProtocol
from latentkv.server.context import Server
from latentkv.server.loading import LoadingApp
from latentkv.server.logs import log_to_stderr
from latentkv.server.metrics import Metrics
from latentkv.server.served import ServedModel
from latentkv.server.settings import ServerSettings
from latentkv.text.tools import choose_format

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 15
GRACE_SECONDS = 2
"""After draining, for the last words to be sent."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, taken before a model is loaded: a port that is in use shows at once.

    Raises:
        ConfigError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named: asyncio sends small pieces at once (TCP_NODELAY) only where a socket says that it is TCP.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"Port {port} of {host} is in use already: stop the other server, or choose another --port."
            ) from None
        raise ConfigError(
            f"{host}:{port} cannot be listened on ({error.strerror}): choose another --host or --port."
        ) from None
    return listening


def make_server(
    llm: LLM,
    name: str,
    settings: ServerSettings,
    *,
    tool_format: str | None = None,
    other_names: Sequence[str] = (),
) -> Server:
    """All that `create_app` needs; the engine's thread keeps the limits of `settings` from now on.

    Args:
        llm: the model.
        name: what clients call it, and what answers say.
        settings: the server's.
        tool_format: how the model writes tool calls; None: as its template tells.
        other_names: that clients may call it by, too.

    Raises:
        RequestError: there is no tool format of this name.
    """
    template = llm.tokenizer.chat_template_text if llm.tokenizer else ""
    format = choose_format(template, llm.config.model_type, tool_format)
    model = ServedModel(llm, name, format, other_names)
    llm.thread.guard(max_open=settings.max_open, stall_seconds=settings.stall_seconds, after_step=model.outbox.flush)
    return Server(model, settings, Metrics(llm.engine, name))


def serve_forever(
    listening: socket.socket, load: Callable[[], Server], settings: ServerSettings, ready: Callable[[Server], None]
) -> int:
    """Answer at once, and serve a model from when it is loaded until a signal or the engine's death.

    Args:
        listening: as `bind` gives it.
        load: loads the model, in a thread of its own; meanwhile every path answers 503.
        settings: that the model will be served with.
        ready: called with what was loaded when it is served.

    Returns:
        The exit code: 0 after a signal, 1 if the engine died. A thread that hangs in a step, or still loads, may run.

    Raises:
        Exception: what `load` raised.
    """
    run = _Run(load, settings, ready)
    run.web.run(sockets=[listening])
    gc.unfreeze()
    if run.failure is not None:
        raise run.failure
    return 1 if run.died else 0


class _Run:
    """A server from its first moment to its last.

    Attributes:
        web: the HTTP server.
        failure: why there is no model.
        died: why the engine is dead; "" while it is not.
    """

    def __init__(self, load: Callable[[], Server], settings: ServerSettings, ready: Callable[[Server], None]) -> None:
        self.failure: BaseException | None = None
        self.died = ""
        self._load_server = load
        self._tell_ready = ready
        self._server: Server | None = None
        app = LoadingApp(self._load, self._ready, self._failed)
        self.web = _Server(uvicorn_config(app, settings), self._drain, settings.drain_seconds)

    def _load(self) -> ASGIApp:
        self._server = server = self._load_server()
        return create_app(server, died=self._has_died)

    def _ready(self) -> None:
        log_to_stderr()
        # What is loaded stays: a collection that looks through all of it has everybody wait for a tenth of a second.
        gc.collect()
        gc.freeze()
        if self._server is not None:
            self._tell_ready(self._server)

    def _failed(self, error: BaseException) -> None:
        self.failure = error
        self.web.should_exit = True

    def _has_died(self, reason: str) -> None:
        self.died = reason
        self.web.should_exit = True

    def _drain(self, seconds: float) -> None:
        if self._server is not None:
            self._server.model.thread.drain(seconds)


def uvicorn_config(app: ASGIApp, settings: ServerSettings) -> uvicorn.Config:
    """How uvicorn is to serve an app."""
    return uvicorn.Config(
        app,
        http=cast("type[asyncio.Protocol]", partial(TimelyProtocol, receive_seconds=settings.receive_seconds)),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds) + GRACE_SECONDS,
    )


class _Server(uvicorn.Server):
    """Drains the engine as soon as a signal comes, so that open requests get an end or an error in time.

    Args:
        config: of uvicorn.
        drain: called with how long to wait for open requests, in a thread of its own.
        seconds: after the first signal; a second one waits no longer.
    """

    def __init__(self, config: uvicorn.Config, drain: Callable[[float], object], seconds: float) -> None:
        super().__init__(config)
        self._drain = drain
        self._seconds = seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On a signal."""
        # Without uvicorn's own handler, which ends the process by the signal again after all has ended well.
        seconds = 0.0 if self.should_exit else self._seconds
        self.should_exit = True
        threading.Thread(target=self._drain, args=(seconds,), name="latentkv-drain", daemon=True).start()
