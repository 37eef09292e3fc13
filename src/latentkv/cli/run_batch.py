"""`latentkv run-batch`: a file of requests in, a file of answers out."""

from __future__ import annotations

import asyncio
import sys
from contextlib import closing
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

from latentkv.cli.flags import Preset
from latentkv.cli.loading import cache_summary, load_model, store_summary
from latentkv.cli.terminal import note
from latentkv.generation_config import NAMES, describe
from latentkv.option_types import Flag
from latentkv.options import LLMOptions
from latentkv.sampling_params import SamplingParams

Defaults = Annotated[SamplingParams, Preset(*(each.name for each in fields(SamplingParams) if each.name not in NAMES))]
"""Of sampling, what requests may leave open."""


def run_batch(
    requests: Annotated[Path, Flag(metavar="IN.jsonl")],
    answers: Annotated[Path, Flag(metavar="OUT.jsonl")],
    /,
    sampling: Defaults,
    options: LLMOptions,
    *,
    name: Annotated[tuple[str, ...], Flag(("--name", "--served-model-name"))] = (),
    tool_format: str | None = None,
) -> None:
    """Answer a file of requests, in the form of OpenAI's batches, as `latentkv serve` would answer each.

    What is answered stays in OUT.jsonl: after an interruption the same command goes on.

    Example: latentkv run-batch requests.jsonl answers.jsonl -m ./model

    Args:
        requests: file with a request a line: custom_id, method, url (/v1/chat/completions, /v1/completions or
            /v1/responses) and body.
        answers: file for the answers, one a line, in the order in which they are ready.
        sampling: what requests leave open of it.
        options: the model.
        name: what requests call the model, instead of its folder or repo id; repeatable, the first is that of answers.
        tool_format: how the model writes tool calls; None is as its template tells.
    """
    from latentkv.batch.answers import AnswerFile, read_answers
    from latentkv.batch.requests import BatchRequest, read_requests

    asked = read_requests(requests)
    known = read_answers(answers, asked, asked_in=requests)
    left = [request for request in asked.values() if request.custom_id not in known.custom_ids]
    failed, done = known.failed, len(known.custom_ids)
    if not left:
        note(_summary(len(asked), failed, answers))
        return
    # Imported here, as the server is: the file is looked at first, and at once.
    from latentkv.batch.run import SETTINGS, answer_all
    from latentkv.checkpoint.source import model_name
    from latentkv.progress import progress_bar
    from latentkv.server.run import make_server

    llm = load_model(options)
    if done:
        note(f"{done:,} of {len(asked):,} requests are answered in {answers} already")
    if llm.store:
        note(store_summary(llm.store))
    given = {name: value for name in NAMES if (value := getattr(sampling, name)) is not None}
    llm.sampling_defaults = MappingProxyType({**llm.sampling_defaults, **given})
    if llm.sampling_defaults:
        note(f"what requests leave open of sampling: {describe(llm.sampling_defaults)}")
    shown, *others = name or (model_name(options.model) if options.model else "latentkv",)
    server = make_server(llm, shown, SETTINGS, tool_format=tool_format, other_names=others)
    try:
        with (
            closing(AnswerFile(answers, known)) as out,
            progress_bar(len(left), shown=sys.stderr.isatty()) as bar,
        ):

            def take(request: BatchRequest, status: int, request_id: str, body: object) -> None:
                nonlocal failed, done
                out.add(request, status, request_id, body)
                failed, done = failed + (status != 200), done + 1
                bar.add(0, finished=True)

            count = partial(bar.add, finished=False)
            asyncio.run(answer_all(server, left, take, count, at_once=options.max_running))
    except BaseException:
        note(f"{done:,} of {len(asked):,} requests are answered and kept in {answers}: the same command goes on.")
        raise
    finally:
        llm.close()
    note(f"{_summary(len(asked), failed, answers)}; {cache_summary(llm)}")


def _summary(requests: int, failed: int, answers: Path) -> str:
    refused = f", {failed:,} of them with an error" if failed else ""
    return f"all {requests:,} requests are answered in {answers}{refused}"
