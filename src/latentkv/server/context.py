"""What a route knows of the request under way beside its body."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar, cast
from uuid import uuid4

from fastapi import Depends
from starlette.requests import Request as HttpRequest

from latentkv.server.errors import ApiError
from latentkv.server.metrics import Metrics
from latentkv.server.served import ServedModel
from latentkv.server.settings import ServerSettings

T = TypeVar("T")

CLIENT_LEFT = 499  # nginx's status for it, in the log only: nobody reads the answer


@dataclass
class HeldBytes:
    """Bytes of the bodies of all requests under way."""

    bytes: int = 0


@dataclass
class Server:
    """What lives as long as the app."""

    model: ServedModel
    settings: ServerSettings
    metrics: Metrics
    held: HeldBytes = field(default_factory=HeldBytes)


@dataclass
class Context:
    """One request's surroundings.

    Attributes:
        server: all that is shared.
        http: the request.
        salt: who shares prefixes with it.
        log: what its line in the log says beside the usual.
        notes: what its answer says in a header: parts of what was asked that are left out, as was allowed.
    """

    server: Server
    http: HttpRequest
    salt: str
    log: dict[str, Any]
    notes: list[str]

    @property
    def model(self) -> ServedModel:
        """The model."""
        return self.server.model

    def note_user(self, user: str | None) -> None:
        """Write who asks, as the client calls them, into the log."""
        if user is not None:
            self.log["user"] = user

    def part_prefixes(self, salt: str | None, *, cached: bool) -> None:
        """Share prefixes under `salt` only, or, unless `cached`, with nobody."""
        if salt is not None or not cached:
            own = salt if cached else uuid4().hex
            self.salt = hashlib.sha256(f"{self.salt}\0{own}".encode("utf-8", "backslashreplace")).hexdigest()

    def require_model(self, name: str | None) -> None:
        """Raise a 404 unless the one model is meant."""
        if name is not None and name not in self.model.names:
            raise ApiError(
                404,
                f"There is no model {name[:200]!r} here: use {self.model.name!r}, or leave model out.",
                param="model",
                code="model_not_found",
            )

    async def unless_client_leaves(self, work: Awaitable[T]) -> T:
        """Await `work`, and cancel it when the client goes away: nobody else would notice before the end."""
        task = asyncio.ensure_future(work)
        leaving = asyncio.create_task(_until_disconnect(self.http.receive))
        try:
            await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ApiError(CLIENT_LEFT, "The client left.", code="client_left")
            return task.result()
        finally:
            task.cancel()
            leaving.cancel()
            await asyncio.wait({task, leaving})


async def _until_disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _context(http: HttpRequest) -> Context:  # async: FastAPI would run it in a thread
    server = cast(Server, http.app.state.server)
    scope = http.scope
    return Context(server, http, scope.get("latentkv.salt", ""), scope["latentkv.log"], scope["latentkv.notes"])


InContext = Annotated[Context, Depends(_context)]
