"""What a server is asked: the same requests for every server, given the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from random import Random

from latentkv.bench.load.lengths import Lengths
from latentkv.bench.load.text import cut
from latentkv.errors import RequestError

# Two prompts begin at least this many characters apart, so that no prefix cache knows one from the other.
_STRIDE = 8


@dataclass(frozen=True)
class LoadRequest:
    """One request: its prompt, the tokens that this was aimed at, and how many to generate."""

    prompt: str
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class TokenRuler:
    """How many characters make a prompt of so many tokens, on one server.

    Attributes:
        characters_per_token: of the text that prompts are cut from.
        overhead_tokens: what the server adds to every prompt: a first token, a chat template.
    """

    characters_per_token: float
    overhead_tokens: float = 0.0

    def characters(self, tokens: float) -> int:
        """Characters of a prompt that the server will count as about `tokens`, at least 1."""
        return max(1, round((tokens - self.overhead_tokens) * self.characters_per_token))


@dataclass(frozen=True)
class Workload:
    """Requests, drawn with a seed.

    Attributes:
        prompt_tokens: of every prompt, the shared prefix not among them.
        output_tokens: to generate.
        shared_prefix: tokens in front of every prompt that are the same in all.
        text: what prompts are cut from, not empty.
        text_name: what to call that.
        seed: same seed, same requests.
    """

    prompt_tokens: Lengths
    output_tokens: Lengths
    shared_prefix: int
    text: str
    text_name: str
    seed: int

    def __post_init__(self) -> None:
        if self.shared_prefix < 0:
            raise RequestError(f"--shared-prefix must be at least 0, not {self.shared_prefix}.")

    def facts(self) -> dict[str, str | int]:
        """What a reader must know of it, by name."""
        return {
            "prompt tokens": str(self.prompt_tokens),
            "output tokens": str(self.output_tokens),
            "shared prefix": self.shared_prefix,
            "text": self.text_name,
            "seed": self.seed,
        }

    def requests(self, ruler: TokenRuler, part: int, parts: int) -> Iterator[LoadRequest]:
        """Requests without end, for one of `parts` parts of a measurement.

        Every part has the same lengths in the same order, but prompts of its own: a prefix cache that has seen one part
        knows nothing but the shared prefix of the next. Text shorter than all prompts together repeats.
        """
        lengths = Random(f"{self.seed} lengths")
        prefix = self._prefix(ruler)
        for start in cycle(self._starts[1 + part :: parts] or self._starts):
            tokens = self.prompt_tokens.draw(lengths)
            prompt = prefix + cut(self.text, start, ruler.characters(tokens))
            yield LoadRequest(prompt, self.shared_prefix + tokens, self.output_tokens.draw(lengths))

    def sample(self, characters: int) -> LoadRequest:
        """One token's answer to `characters` characters, to see how the server counts them."""
        return LoadRequest(cut(self.text, self._starts[0], characters), 0, 1)

    def _prefix(self, ruler: TokenRuler) -> str:
        return cut(self.text, self._starts[0], round(self.shared_prefix * ruler.characters_per_token))

    @cached_property
    def _starts(self) -> list[int]:
        """Where prompts begin, in the order of their use; the first is the shared prefix's."""
        starts = list(range(0, len(self.text), _STRIDE))
        Random(f"{self.seed} starts").shuffle(starts)
        return starts
