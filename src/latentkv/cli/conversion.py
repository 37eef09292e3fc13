"""What `latentkv convert` and `latentkv heal` share: their texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from latentkv.cli.terminal import console, progress
from latentkv.errors import RequestError
from latentkv.fingerprint import file_states, fingerprint
from latentkv.ranges import require_range

if TYPE_CHECKING:
    from torch import Tensor

SELF = "self"
EVAL_SEED = 1_000_000
"""Of the held-out text that the source writes."""


def require_text_options(sequences: int | None, length: int, *texts: str | None) -> None:
    """Raise `RequestError` for sizes that no model takes, and for a text that is no readable file."""
    if sequences is not None:
        require_range("sequences", sequences, RequestError)
    require_range("length", length, RequestError)
    for text in texts:
        if text is None or text == SELF:
            continue
        try:
            with Path(text).open("rb"):
                pass
        except OSError as problem:
            raise RequestError(
                f"{text} cannot be read ({problem.strerror}): name a UTF-8 text file, or self."
            ) from None


def require_length(folder: Path, length: int) -> None:
    """Raise `RequestError` for a length that the model does not take."""
    from latentkv.models.config_reader import read_config

    require_range("length", length, RequestError, high=read_config(folder).max_positions)


def text_tokens(
    folder: Path,
    texts: Sequence[str],
    sequences: int,
    length: int,
    *,
    seed: int,
    stage: str,
    at_most: bool = False,
    kept: Path | None = None,
) -> Tensor:
    """[sequences, length] ids of files, and of what the source writes.

    Args:
        folder: of the source.
        texts: names of files, or `SELF`; each gives as many sequences as the others, the first ones one more.
        sequences: of all texts together.
        length: tokens of each.
        seed: of what the source writes.
        stage: what they are for, to be shown.
        at_most: a file that has not as many may give fewer.
        kept: a folder where what the source has written is found again after an interruption; None: nothing is kept.
    """
    import torch

    if repeated := [text for text in dict.fromkeys(texts) if texts.count(text) > 1]:
        raise RequestError(f"{repeated[0]} is named twice, and would be the same text twice: name each text once.")
    if sequences < len(texts):
        raise RequestError(f"{len(texts)} texts need as many --sequences, and {sequences} are asked for: give more.")

    from latentkv.convert.text import load_writer, tokens_of_file, tokens_of_model

    found: list[Tensor] = []
    for number, text in enumerate(texts):
        own = sequences // len(texts) + (number < sequences % len(texts))
        if text != SELF:
            with console(stderr=True).status(f"{stage}: read {text}"):
                found.append(tokens_of_file(folder, Path(text), sequences=own, length=length, at_most=at_most))
            continue
        with progress(stage) as on_progress:
            written = tokens_of_model(
                load_writer(folder, length),
                sequences=own,
                length=length,
                seed=seed,
                kept=None if kept is None else kept / f"{_identity(folder, length, seed)}.u32",
                on_token=lambda done, total: on_progress("the source writes, tokens", done, total),
            )
        found.append(written)
    return torch.cat(found)


def _identity(folder: Path, length: int, seed: int) -> str:
    """Tells what a source writes with a seed from what any other writes."""
    from latentkv.checkpoint.tensors import open_tensors

    return fingerprint([repr((file_states(open_tensors(folder).files), length, seed)).encode()])[:16]
