"""`Counters`: what an engine has done since it began."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Totals; they only grow.

    Attributes:
        steps: steps of the model.
        read_tokens: tokens read by the model: of prompts (again after a preemption), chosen ones, and drafts.
        prompt_tokens: of the prompts that were taken in.
        generated_tokens: tokens chosen.
        preemptions: sequences that gave their pages back and are read again.
        prefix_queries: prompt tokens that were looked for among the known prefixes.
        prefix_hits: those that were found.
        store_queries: prompt tokens that were looked for in the store, because no page in memory had them.
        store_hits: those that were read from it.
        stored_bytes: written to it.
        loaded_bytes: read from it.
        drafted_tokens: tokens proposed to the model.
        accepted_tokens: those that it would have chosen too.
        lost_tokens: read or found by sequences that then gave their pages back to others.
    """

    steps: int = 0
    read_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    store_queries: int = 0
    store_hits: int = 0
    stored_bytes: int = 0
    loaded_bytes: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    lost_tokens: int = 0

    @property
    def known_tokens(self) -> int:
        """Tokens that were read or found, without those that were lost: it does not grow by reading the same again."""
        return self.read_tokens + self.prefix_hits + self.store_hits - self.lost_tokens
