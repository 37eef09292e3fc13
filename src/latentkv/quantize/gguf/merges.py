"""Merges of a tokenizer in the form that a GGUF file wants them: out of ranks, or as scores."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from latentkv.text.decoders import BYTE_CHARACTERS
from latentkv.text.sentencepiece_model import PieceType


def merges_of_ranks(pieces: Sequence[str]) -> list[str]:
    """The merges, "left right", of tokens whose order says all of them (tiktoken's files).

    Each token's is what its bytes have become when only merges before it are done.

    Args:
        pieces: in the order of their ranks, bytes as byte-level characters.
    """
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    single = frozenset(BYTE_CHARACTERS.values())
    merges: list[str] = []
    for rank, piece in enumerate(pieces):
        if piece in single:
            continue
        parts = list(piece)
        while len(parts) > 2:
            candidates = [(ranks.get(one + other, rank), place) for place, (one, other) in enumerate(pairwise(parts))]
            lowest, place = min(candidates)
            if lowest >= rank:
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            merges.append(" ".join(parts))
    return merges


def scores_of_merges(merges: Sequence[Any], tokens: Sequence[str], types: Sequence[int]) -> list[float] | None:
    """Scores that lead to the same merges as a list of them; None where there are none.

    The piece that is made first scores highest.

    Args:
        merges: pairs of pieces, the first to be done first.
        tokens: of the vocabulary.
        types: likewise, numbers of `PieceType`.
    """
    pairs = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in merges]
    scores: dict[str, float] = {}
    for pair in pairs:
        scores.setdefault("".join(pair), float(-len(scores)))
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == PieceType.NORMAL}
    # What is a token is merged to by its score, whether a merge makes it or not.
    made = {
        (text[:cut], text[cut:])
        for text in normal
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    }
    places = [scores["".join(pair)] for pair in pairs]
    if made != set(pairs) or places != sorted(places, reverse=True):
        return None
    lowest = float(-len(scores))
    return [scores.get(token, lowest) for token in tokens]
