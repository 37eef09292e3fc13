"""Before any load: which model, which fields the server takes, and how it counts tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from latentkv.bench.load.client import NO_TEXT, PATHS, Answer, Endpoint, Failure, RequestForm, ServeClient
from latentkv.bench.load.workload import TokenRuler, Workload
from latentkv.errors import RemoteServerError, RequestError

# Characters of the prompts that tokens are counted of: hardly any, which shows what the server adds of its own, and as
# many as the average prompt will have.
_FIRST_SAMPLE, _LEAST_SECOND_SAMPLE, _MOST_SECOND_SAMPLE = 16, 2048, 16384
_LIKELY_CHARACTERS_PER_TOKEN = 4
_MOST_LISTED = 8

_IGNORE_EOS: Mapping[str, Any] = {"ignore_eos": True}
_WANT_USAGE: Mapping[str, Any] = {"stream_options": {"include_usage": True}}
_WITHOUT = {"ignore_eos": "answers may be shorter than asked", "stream_options": "it may report no usage"}


@dataclass(frozen=True)
class Prepared:
    """What was found out.

    Attributes:
        form: how requests are written for this server.
        ruler: how long their prompts are.
        notes: what the reader of the results must know.
    """

    form: RequestForm
    ruler: TokenRuler
    notes: tuple[str, ...]


def server_root(url: str) -> str:
    """The address without the /v1 that clients are often given.

    Raises:
        RequestError: it is no http(s) address.
    """
    try:
        parts = urlsplit(url.strip())
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port beyond 65535, half an IPv6 address
        parts, usable = urlsplit(""), False
    if not usable:
        raise RequestError(f"{url!r} is not the address of a server; write for example http://127.0.0.1:8000.")
    path = parts.path.rstrip("/").removesuffix("/v1")
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


async def prepare(
    client: ServeClient,
    workload: Workload,
    *,
    model: str | None,
    endpoint: Endpoint,
    ignore_eos: bool,
    extra_body: Mapping[str, Any],
    characters_per_token: float | None,
) -> Prepared:
    """Find out what a measurement needs to know, with two short requests.

    Args:
        client: of the server.
        workload: what will be asked; the calibration reads the same text.
        model: its name; None: the only one that the server has.
        endpoint: which of the two.
        ignore_eos: ask for exactly as many tokens as the workload says, where the server takes it.
        extra_body: fields of every request, as the user wants them.
        characters_per_token: None: calibrated from the server's own counts.

    Raises:
        RemoteServerError: the server cannot be reached, refuses, has no such model or several to choose from, or does
            not count tokens.
    """
    form, answer, notes = await _accepted_form(
        client, workload, model or await _only_model(client), endpoint, ignore_eos, extra_body
    )
    if answer.output_tokens is None:
        notes.append("The server reports no usage: tokens are counted as chunks with text.")
    if characters_per_token is not None:
        return Prepared(form, TokenRuler(characters_per_token), tuple(notes))
    if answer.prompt_tokens is None:
        raise RemoteServerError(
            f"The server at {client.url} does not say how many tokens a prompt has; give --chars-per-token, such as 4."
        )
    likely = round(workload.prompt_tokens.mean * _LIKELY_CHARACTERS_PER_TOKEN)
    characters = min(max(likely, _LEAST_SECOND_SAMPLE), _MOST_SECOND_SAMPLE)
    longer = await client.ask(form, workload.sample(characters), perf_counter())
    if longer.failure or longer.prompt_tokens is None or longer.prompt_tokens <= answer.prompt_tokens:
        said = longer.failure.message if longer.failure else f"it counts {longer.prompt_tokens} tokens"
        raise RemoteServerError(
            f"Tokens cannot be counted with a prompt of {characters:,} characters ({said}); give --chars-per-token."
        )
    per_token = (characters - _FIRST_SAMPLE) / (longer.prompt_tokens - answer.prompt_tokens)
    overhead = max(0.0, answer.prompt_tokens - _FIRST_SAMPLE / per_token)
    return Prepared(form, TokenRuler(per_token, overhead), tuple(notes))


async def _only_model(client: ServeClient) -> str:
    models = await client.models()
    if isinstance(models, Failure):
        raise _refused(client.url, models, "/v1/models", "name the model with --model if it has no such list")
    if len(models) != 1:
        raise RemoteServerError(
            f"The server at {client.url} lists these models: {_listed(models)}; choose one with --model."
        )
    return models[0]


async def _accepted_form(
    client: ServeClient,
    workload: Workload,
    model: str,
    endpoint: Endpoint,
    ignore_eos: bool,
    extra_body: Mapping[str, Any],
) -> tuple[RequestForm, Answer, list[str]]:
    """The form with all optional fields that the server takes, and its answer to a first prompt in it."""
    wanted = {**(_IGNORE_EOS if ignore_eos else {}), **_WANT_USAGE}
    for fields in (wanted, _WANT_USAGE, {}):
        form = RequestForm(model, endpoint, {**fields, **extra_body})
        answer = await client.ask(form, workload.sample(_FIRST_SAMPLE), perf_counter())
        failure = answer.failure
        if failure is None or failure.kind == NO_TEXT:  # one token may well be half a character
            refused = [name for name in wanted if name not in fields]
            return form, answer, [f"The server takes no {name}: {_WITHOUT[name]}." for name in refused]
        if failure.status not in (400, 422):
            break
    # The last one: what is left to object to is not these fields.
    raise await _why_refused(client, form, failure)


async def _why_refused(client: ServeClient, form: RequestForm, failure: Failure) -> RemoteServerError:
    path = PATHS[form.endpoint]
    if failure.status != 404:
        return _refused(client.url, failure, path, "see what the server's own log says")
    models = await client.models()
    served = "" if isinstance(models, Failure) else f"; it lists: {_listed(models)}"
    return RemoteServerError(
        f"The server at {client.url} does not know {path} or the model {form.model!r} ({failure.message}){served}."
    )


def _listed(models: Sequence[str]) -> str:
    more = f" and {len(models) - _MOST_LISTED} more" if len(models) > _MOST_LISTED else ""
    return (", ".join(models[:_MOST_LISTED]) or "none") + more


def _refused(url: str, failure: Failure, path: str, remedy: str) -> RemoteServerError:
    """One sentence on why nothing can be measured."""
    if failure.kind == "cannot connect":
        return RemoteServerError(
            f"No server can be reached at {url} ({failure.message}); start one there, or give another address."
        )
    if failure.status in (401, 403):
        return RemoteServerError(
            f"The server at {url} refuses the API key ({failure.kind}: {failure.message}); give the right one with "
            "--api-key or in OPENAI_API_KEY."
        )
    return RemoteServerError(f"The server at {url} fails on {path} ({failure.kind}: {failure.message}); {remedy}.")
