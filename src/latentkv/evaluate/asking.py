"""A model that is asked: examples as its prompts, greedy answers from the engine, all of a call together."""

from __future__ import annotations

from collections.abc import Sequence

from latentkv.errors import RequestError
from latentkv.evaluate.questions import Example
from latentkv.llm import LLM
from latentkv.sampling_params import SamplingParams
from latentkv.text import Tokenizer

_SPARE_TOKENS = 6
"""That an answer may have more than the right one: blanks, another way to cut the same text."""


class Asker:
    """A model with the form in which it is asked.

    Args:
        llm: the model.
        name: what it is called.
        chat: by its chat template, else as plain text.

    Raises:
        RequestError: the model has no tokenizer.
    """

    def __init__(self, llm: LLM, name: str, *, chat: bool) -> None:
        self.llm = llm
        self.name = name
        self._chat = chat
        self._tokenizer = require_tokenizer(llm)

    def prompt(self, example: Example) -> list[int]:
        """The token ids of an example."""
        if self._chat:
            # Templates that know no reasoning take no notice of it.
            return self.llm.chat_tokens(self.llm.chat_text(example.as_messages(), enable_thinking=False))
        return self._encode(example.as_text(), add_bos=True)

    def size(self, example: Example) -> int:
        """Tokens of a prompt and of what its answer may take."""
        return len(self.prompt(example)) + self._room(example)

    def count(self, sentences: Sequence[str]) -> int:
        """Tokens of a text of these sentences."""
        return len(self._encode(" ".join(sentences)))

    def answer(self, examples: Sequence[Example], *, in_turn: bool = False) -> list[str]:
        """What the model says, its likeliest token each time.

        Args:
            examples: that are answered together.
            in_turn: rather one after another, so that each has from the cache what it begins with as the one before.
        """
        if in_turn:
            return [answer for example in examples for answer in self.answer([example])]
        params = [SamplingParams(max_tokens=self._room(example), temperature=0) for example in examples]
        return [found.text for found in self.llm.generate([self.prompt(example) for example in examples], params)]

    def _room(self, example: Example) -> int:
        return len(self._encode(" " + example.question.answer)) + _SPARE_TOKENS

    def _encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        return self._tokenizer.encode(text, add_bos=add_bos and self._tokenizer.adds_bos)


def require_tokenizer(llm: LLM) -> Tokenizer:
    """The tokenizer of a model.

    Raises:
        RequestError: it has none.
    """
    if llm.tokenizer is None:
        raise RequestError(f"To evaluate a model needs a tokenizer, and {llm.folder} has none: add tokenizer.json.")
    return llm.tokenizer


def longest(llm: LLM) -> int:
    """Tokens that a prompt and its answer may have together: what the model takes and its cache holds."""
    return min(llm.max_context, llm.cache.num_pages * llm.cache.page_size)
