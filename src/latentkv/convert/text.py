"""Text to calibrate and to heal on: a file's, or what the source writes by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latentkv.engine import SamplingParams
from latentkv.engine.memory import default_cache_bytes, free_memory
from latentkv.errors import RequestError
from latentkv.llm import LLM
from latentkv.llm_options import tokenizer_of
from latentkv.models.config_reader import read_config
from latentkv.state import PAGE_SIZE

TOGETHER = 64
"""Sequences that the source writes at a time."""
_KEPT = np.dtype("<u4")


def load_writer(folder: Path, length: int) -> LLM:
    """A source in float32; where memory allows, its cache has room for `TOGETHER` sequences of `length` tokens."""
    specs = read_config(folder).specs("fp32")
    pages = -(-max(length, 1) // PAGE_SIZE) + 1  # the scheduler lets a request in while there is a page in hand for it
    room = default_cache_bytes(specs, TOGETHER * pages * PAGE_SIZE, free_memory() // 2)
    return LLM(folder, dtype="fp32", kv_cache_bytes=room, generation_config="none")


def tokens_of_file(folder: Path, path: Path, *, sequences: int, length: int, at_most: bool = False) -> Tensor:
    """[sequences, length] ids: windows spread evenly over a UTF-8 text, each after the token that begins texts.

    Args:
        folder: of the model whose tokenizer reads the text; its weights are not loaded.
        path: of the text.
        sequences: windows.
        length: tokens of each.
        at_most: take fewer where the text has not as many.

    Raises:
        RequestError: the model has no tokenizer, or the text is too short.
    """
    tokenizer = tokenizer_of(folder, read_config(folder))
    if tokenizer is None:
        raise RequestError(
            f"{folder} has no tokenizer to read {path} with: put its tokenizer files beside the weights."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read as UTF-8 text: {error}.") from None
    first = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    own = length - len(first)
    ids = torch.tensor(tokenizer.encode(text, add_bos=False), dtype=torch.int64)
    if at_most:
        sequences = max(min(sequences, len(ids) // own), 1)
    if len(ids) < sequences * own:
        raise RequestError(
            f"{path} has {len(ids):,} tokens, {sequences * own:,} are needed: give a longer text, or ask for fewer."
        )
    starts = torch.linspace(0, len(ids) - own, sequences).long()
    rows = torch.stack([ids[start : start + own] for start in starts])
    return torch.cat([torch.tensor(first).expand(sequences, -1), rows], dim=1) if first else rows


def tokens_of_model(
    llm: LLM,
    *,
    sequences: int,
    length: int,
    seed: int = 0,
    kept: Path | None = None,
    on_token: Callable[[int, int], object] = lambda done, total: None,
) -> Tensor:
    """[sequences, length] ids that the model itself writes at temperature 1, from the token that begins texts.

    Args:
        llm: the model.
        sequences: to write.
        length: tokens of each.
        seed: each sequence has one of its own, from this one on.
        kept: a file that holds the finished sequences of an interrupted run of the same call, and to which those that
            are finished now are added; None: nothing is kept.
        on_token: called with the tokens that are written, and all of them.

    Raises:
        RequestError: the model has no such token, or the sequences are longer than its context.
    """
    begin = llm.config.bos_token_id
    if begin is None:
        raise RequestError("This model has no token to begin a text with: give a text.")
    rows = [] if kept is None else _kept_rows(kept, length, llm.config.vocab_size)[:sequences]
    total = sequences * (length - 1)
    while len(rows) < sequences:
        first = len(rows)
        seeds = range(seed + first, seed + min(first + TOGETHER, sequences))
        params = [SamplingParams(max_tokens=length - 1, temperature=1.0, ignore_eos=True, seed=each) for each in seeds]
        written: list[list[int]] = [[begin] for _ in params]
        events = llm.engine.run([llm.request([begin], each) for each in params])
        for done, event in enumerate(events, first * (length - 1) + 1):
            written[event.index].append(event.token_id)
            on_token(done, total)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with kept.open("ab") as file:
                file.write(np.array(written, dtype=_KEPT).tobytes())
        rows += written
    return torch.tensor(rows)


def _kept_rows(path: Path, length: int, vocab_size: int) -> list[list[int]]:
    """The whole sequences in a file; a last one that is not whole is cut off.

    Raises:
        RequestError: it holds something else than tokens.
    """
    if not path.exists():
        return []
    size = path.stat().st_size // (_KEPT.itemsize * length) * _KEPT.itemsize * length
    with path.open("r+b") as file:
        file.truncate(size)
    rows = np.fromfile(path, dtype=_KEPT).reshape(-1, length)
    if rows.size and rows.max() >= vocab_size:
        raise RequestError(f"{path} is damaged (the token {rows.max():,} is not the model's): remove it.")
    return rows.tolist()
