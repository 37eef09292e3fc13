"""`ServedModel`: one loaded model, its engine in a thread, and its tokens as pieces of text for the event loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

from latentkv.completion import Piece, TextOutput, joined, submit_for_text
from latentkv.engine import Request
from latentkv.engine.thread import EngineThread
from latentkv.errors import RequestError, TokenizerError
from latentkv.llm import LLM
from latentkv.server.outbox import Outbox
from latentkv.server.protocol.messages import read_messages
from latentkv.text import Tokenizer
from latentkv.text.token_bytes import token_bytes
from latentkv.text.tools import OutputFormat

T = TypeVar("T")

STEP_SECONDS = 0.25
"""That a step may take, about: so long a newcomer waits, and so long the pages of a client who left stay taken."""
ENCODERS = 4
"""Prompts that are turned into tokens at once."""
COMPILERS = 2
"""And prompts whose grammar must be compiled first, which may take seconds; they hold up no others."""


class Generation:
    """Requests on their way, and what comes out of them.

    Args:
        thread: of the engine.
        outbox: by which the engine's thread hands over.
        requests: what to run.
        outputs: the text of each.
        salt: who shares prefixes with them.
        seconds: after which they are given up.

    Raises:
        LatentKVError: as `EngineThread.submit`; none of them runs then.
    """

    def __init__(
        self,
        thread: EngineThread,
        outbox: Outbox,
        requests: Sequence[Request],
        outputs: Sequence[TextOutput],
        salt: str,
        seconds: float,
    ) -> None:
        self._thread = thread
        self._outbox = outbox
        self._left = len(requests)
        self._begun: set[int] = set()  # the engine's thread alone uses it
        self._arrived: deque[tuple[int, Piece]] = deque()  # the engine's thread adds at its end, the loop takes
        self._told = False  # or about to be: the loop, that something has arrived
        self._failure: Exception | None = None
        self._anything = asyncio.Event()
        outbox.open()
        self._tickets = submit_for_text(thread, requests, outputs, self._deliver, salt=salt)
        self._open = True
        outbox.streams += 1
        self._deadline = asyncio.get_running_loop().call_later(seconds, self._fail, TimeoutError())

    def _deliver(self, index: int, piece: Piece | Exception) -> None:  # in the engine's thread
        if isinstance(piece, Exception):
            self._outbox.put(partial(self._fail, piece), urgent=True)
            self._outbox.flush()  # it may be raised outside of any step
            return
        urgent = piece.finish_reason is not None or index not in self._begun
        self._begun.add(index)
        self._arrived.append((index, piece))
        if urgent or not self._told:
            self._told = True
            self._outbox.put(self._tell, urgent=urgent)

    def _tell(self) -> None:
        self._told = False  # before the look: of what comes after it is told again
        self._anything.set()

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        self._anything.set()

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece]]:
        """(which request, what is new of it), until all have ended; what came since the last one of it is joined.

        Raises:
            TimeoutError: the deadline has passed.
            LatentKVError: a request failed.
        """
        while self._left:
            if not self._arrived:
                if self._failure is not None:
                    raise self._failure
                self._anything.clear()
                await self._anything.wait()
            arrived: dict[int, list[Piece]] = {}
            while self._arrived:
                index, piece = self._arrived.popleft()
                arrived.setdefault(index, []).append(piece)
            for index, pieces in arrived.items():
                piece = joined(pieces)
                self._left -= piece.finish_reason is not None
                yield index, piece

    def close(self) -> None:
        """Give up the requests that have not ended; more than once does no harm."""
        self._outbox.streams -= self._open
        self._open = False
        self._deadline.cancel()
        for ticket in self._tickets:
            self._thread.abort(ticket)


class ServedModel:
    """What the routes ask.

    Args:
        llm: the model.
        name: what clients call it.
        format: how it writes tool calls and reasoning.
        other_names: that clients may call it by, too.

    Attributes:
        names: all of them, each once.
        thread: that the model was loaded in, and is run in.
        outbox: by which it hands over what came out; to be flushed after every step.
        created: when it was loaded, in seconds since 1970.
    """

    def __init__(self, llm: LLM, name: str, format: OutputFormat, other_names: Sequence[str] = ()) -> None:
        self.llm = llm
        self.name = name
        self.names = tuple(dict.fromkeys((name, *other_names)))
        self.thread = llm.thread
        self.outbox = Outbox()
        self.format = format
        self.created = int(time.time())
        self._encoders = asyncio.Semaphore(ENCODERS)
        self._compilers = asyncio.Semaphore(COMPILERS)

    @property
    def capacity(self) -> int:
        """Tokens that one request may have, prompt and completion together."""
        cache = self.llm.cache
        return min(self.llm.max_context, cache.num_pages * cache.page_size)

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer, or a `RequestError`."""
        if self.llm.tokenizer is None:
            raise RequestError("This model has no tokenizer: use token ids.")
        return self.llm.tokenizer

    @property
    def template(self) -> str:
        """Source of the chat template; "" for the plain one."""
        return self.require_tokenizer().chat_template_text

    def chat_text(self, messages: Sequence[Mapping[str, Any]], **template_variables: Any) -> str:
        """A conversation as the model's template writes it; an `ApiError` for what the template would not notice."""
        return self.llm.chat_text(read_messages(messages, self.template), **template_variables)

    def room_after(self, prompt_tokens: int) -> int:
        """New tokens that the context and the cache can hold after a prompt; 1 where it is too long already."""
        return max(self.capacity - prompt_tokens, 1)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Their text, special tokens too; without a tokenizer the ids themselves, with commas between."""
        tokenizer = self.llm.tokenizer
        return tokenizer.decode(token_ids, skip_special=False) if tokenizer else ",".join(map(str, token_ids))

    @cached_property
    def special_markers(self) -> dict[str, int]:
        """The markers of `format` that are special tokens: a grammar names those by number."""
        tokenizer = self.llm.tokenizer
        ids = {marker: tokenizer.token_id(marker) for marker in self.format.markers} if tokenizer else {}
        special = tokenizer.special_ids if tokenizer else frozenset[int]()
        return {marker: token for marker, token in ids.items() if token is not None and token in special}

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        try:
            return token_bytes(self.require_tokenizer())
        except TokenizerError:  # its tokens stand for no bytes of their own
            return []

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to a text: perhaps a part of a character."""
        own = self._token_bytes[token] if token < len(self._token_bytes) else b""
        return own or self.text_of([token]).encode()

    async def off_loop(self, work: Callable[[], T], *, compiles: bool = False) -> T:
        """Run what takes long (templates, tokenizers, grammars) beside the event loop, a few at a time."""
        async with self._compilers if compiles else self._encoders:
            return await asyncio.to_thread(work)

    def submit(self, requests: list[Request], salt: str, seconds: float, *, keep: Collection[str] = ()) -> Generation:
        """Let `requests` run, from the event loop; close what is returned.

        Args:
            requests: what to run.
            salt: who shares prefixes with them.
            seconds: that they may take altogether.
            keep: special tokens that stay in the text.

        Raises:
            BusyError: too many requests are open; none of these runs.
            EngineStoppedError: the engine takes none.
            RequestError: one could not fit even into an empty cache.
        """
        outputs = [TextOutput(self.llm.tokenizer, request, keep) for request in requests]
        return Generation(self.thread, self.outbox, requests, outputs, salt, seconds)
