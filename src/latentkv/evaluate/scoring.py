"""What models expect of held-out text: windows that each begin anew, of one model, or of two side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from latentkv.engine.comparison import NOTHING, Comparison, blocks_of, compare_logits
from latentkv.engine.scoring import hidden_states, score_text
from latentkv.evaluate.asking import require_tokenizer
from latentkv.evaluate.found import TextFound
from latentkv.llm import LLM

OnWindow = Callable[[int, int], object]
"""Called with the windows done, and all of them."""


@dataclass(frozen=True)
class Windows:
    """The tokens of a text in windows, each read by itself after the token that begins a text, and scored whole.

    Attributes:
        first: the token that begins a text.
        ids: of each window.
    """

    first: int
    ids: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, llm: LLM, pieces: Sequence[str], size: int) -> Windows:
        """Cut each piece of a text, as the model's tokenizer reads it, into windows of `size` tokens.

        Raises:
            RequestError: the model has no tokenizer, or names no token that begins a text.
        """
        tokenizer = require_tokenizer(llm)
        encoded = [tokenizer.encode(piece, add_bos=False) for piece in pieces]
        return cls(
            llm.first_token,
            tuple(tuple(ids[start : start + size]) for ids in encoded for start in range(0, len(ids), size)),
        )

    @property
    def sizes(self) -> list[int]:
        """Tokens of each window."""
        return [len(ids) for ids in self.ids]


def score_pieces(
    model: LLM, source: LLM | None, pieces: Sequence[str], size: int, on_window: OnWindow = lambda done, total: None
) -> TextFound:
    """What a model expects of pieces of text, in windows of `size` tokens, and what its source does.

    Raises:
        RequestError: one has no tokenizer, or names no token that begins a text.
    """
    num_bytes, windows = sum(len(piece.encode()) for piece in pieces), Windows.of(model, pieces, size)
    if source is None:
        return TextFound(num_bytes, windows.sizes, _score(model, windows, on_window))
    source_windows = Windows.of(source, pieces, size)
    if windows != source_windows:
        nats, source_nats = _score(model, windows, on_window), _score(source, source_windows, on_window)
        return TextFound(num_bytes, windows.sizes, nats, source_windows.sizes, source_nats)
    found: list[Comparison] = []
    for ids in windows.ids:
        found.append(_compare(source, model, [windows.first, *ids[:-1]], torch.tensor(ids)))
        on_window(len(found), len(windows.ids))
    return TextFound(
        num_bytes,
        windows.sizes,
        [each.nats for each in found],
        windows.sizes,
        [each.source_nats for each in found],
        [each.divergence for each in found],
        [each.same for each in found],
    )


def _score(llm: LLM, windows: Windows, on_window: OnWindow) -> list[float]:
    """-log p of each window's tokens in nats, summed."""
    found: list[float] = []
    for ids in windows.ids:
        tokens = [windows.first, *ids]
        found.append(llm.thread.call(lambda tokens=tokens: score_text(llm.engine.runner, tokens, len(tokens))).nats)
        on_window(len(found), len(windows.ids))
    return found


def _compare(source: LLM, model: LLM, tokens: list[int], targets: torch.Tensor) -> Comparison:
    """All in the model's thread: two that computed in turn would get in each other's way with their OpenMP threads.

    The source has no requests meanwhile, so that its engine is free.
    """
    before, after = (llm.engine.runner for llm in (source, model))
    vocab_size = max(llm.config.vocab_size for llm in (source, model))

    def compare() -> Comparison:
        source_states, states = hidden_states(before, tokens), hidden_states(after, tokens)
        wanted, found = targets.to(states.device), NOTHING
        for block in blocks_of(len(tokens), vocab_size):
            found += compare_logits(before.logits(source_states[block]), after.logits(states[block]), wanted[block])
        return found

    return model.thread.call(compare)
