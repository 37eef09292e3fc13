"""`ServerSettings`: what the person who starts a server decides, and the caps that every request meets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from latentkv.errors import ConfigError
from latentkv.option_types import Flag
from latentkv.ranges import Range

MAX_PROMPTS = 128
"""Prompts of one request, and completions of all its prompts together."""
MAX_STOPS = 16
"""Stop strings of one request."""
MAX_STOP_CHARACTERS = 1024
"""Characters of a stop string."""
MAX_TOP_LOGPROBS = 20
"""Likeliest tokens that are reported beside each token."""
MAX_MESSAGES = 4096
"""Messages of one conversation."""
MIN_KEY_CHARACTERS = 8


@dataclass(frozen=True)
class ServerSettings:
    """How a server behaves.

    Attributes:
        api_keys: who may use it; empty: anyone who reaches it.
        cors_origins: a web page's origin that browsers let in; repeatable.
        max_body_bytes: size of a request's body at most.
        max_held_bytes: size of the bodies of all requests under way together; more get 503.
        max_open: requests under way and waiting at once; more get 429.
        receive_seconds: time that a request may take to arrive; then its connection is closed.
        request_seconds: time from a request's arrival to its last token at most; then it is given up.
        stall_seconds: time without progress after which the engine counts as dead.
        drain_seconds: time that open requests have to finish when the server is told to stop.
        log_prompts: write prompts and answers into the log.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    cors_origins: Annotated[tuple[str, ...], Flag(("--cors-origin",))] = ()
    max_body_bytes: int = 2 << 20
    max_held_bytes: Annotated[int, Flag(offered=False)] = 64 << 20
    max_open: Annotated[int, Range(1, 65536, whole=True)] = 256
    receive_seconds: Annotated[float, Flag(offered=False)] = 60
    request_seconds: Annotated[float, Range(1)] = 3600
    stall_seconds: Annotated[float, Flag(offered=False)] = 120
    drain_seconds: Annotated[float, Range(0)] = 30
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if any(len(key) < MIN_KEY_CHARACTERS or not key.isascii() or not key.isprintable() for key in self.api_keys):
            raise ConfigError(
                f"An API key is shorter than {MIN_KEY_CHARACTERS} characters or not plain ASCII: choose longer ones, "
                "for example the output of: openssl rand -hex 24"
            )


def read_keys(file: Path | None, environment: str | None) -> tuple[str, ...]:
    """API keys of a file (one a line; # begins a comment line) and of an environment variable (with commas).

    Raises:
        ConfigError: the file cannot be read or names no key.
    """
    keys = [key.strip() for key in (environment or "").split(",") if key.strip()]
    if environment is not None and not keys:
        raise ConfigError("The variable that should hold API keys is empty: put keys into it, or unset it.")
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The API keys in {file} cannot be read: {error}.") from None
        named = [line for line in lines if line and not line.startswith("#")]
        if not named:
            raise ConfigError(f"{file} names no API key: write one a line.")
        keys += named
    return tuple(dict.fromkeys(keys))
