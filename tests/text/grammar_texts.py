"""Texts written token by token, by chance, under a grammar: what any model could write."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator

from latentkv.text import Tokenizer
from latentkv.text.grammar import Grammar

# A writer who never closes what it opened would seldom come to an end.
CLOSING = frozenset('"]},:')


def random_text(grammar: Grammar, tokenizer: Tokenizer, seed: int, max_tokens: int = 400) -> str | None:
    """A text that ends where the grammar lets it; None where `max_tokens` do not suffice, or no token fits."""
    rng, state = random.Random(seed), grammar.start()
    ids: list[int] = []
    while len(ids) < max_tokens:
        allowed = [int(token) for token in state.allowed.nonzero()[0]]
        if state.may_end and (not allowed or rng.random() < 0.4):
            return tokenizer.decode(ids)
        if not allowed:
            return None
        closing = [token for token in allowed if tokenizer.decode([token]) in CLOSING]
        ids.append(rng.choice(closing if closing and rng.random() < 0.6 else allowed))
        state.accept(ids[-1])
    return None


def random_texts(grammar: Grammar, tokenizer: Tokenizer, seeds: Collection[int]) -> Iterator[str]:
    """Those of `random_text` that came to an end; at least one of them."""
    found = [text for seed in seeds if (text := random_text(grammar, tokenizer, seed)) is not None]
    assert found
    yield from found


def takes(grammar: Grammar, ids: list[int]) -> bool:
    """Whether a text, as these tokens, follows the grammar from its beginning to its end."""
    state = grammar.start()
    for token in ids:
        if not state.allowed[token]:
            return False
        state.accept(token)
    return state.may_end
