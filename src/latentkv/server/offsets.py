"""`TextOffsets`: where each token of a completion begins in the text that is answered."""

from __future__ import annotations

from collections.abc import Sequence

from latentkv.text import StreamDecoder, Tokenizer


class TextOffsets:
    """Follows one choice. A token that is no text, as `<s>`, begins where the next one does.

    Args:
        tokenizer: None where there is no text but that of the prompt, its ids with commas between.
        prompt: its tokens.
        echo: what stands before the completion; "" if the prompt is not echoed.
        shows_special: whether special tokens are written in `echo`.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], echo: str, *, shows_special: bool) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._shows_special = shows_special
        self._at = len(echo)
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        if self._decoder:
            self._decoder.push(prompt[-1])  # completions are decoded from there on, too

    def of_prompt(self) -> list[int]:
        """Of the prompt's tokens, in an echo."""
        decoder = StreamDecoder(self._tokenizer, skip_special=not self._shows_special) if self._tokenizer else None
        at, offsets = 0, list[int]()
        for token in self._prompt:
            offsets.append(at)
            at += len(decoder.push(token)) if decoder else len(f"{token},")
        return offsets

    def of_next(self, token: int) -> int:
        """Of the completion's next token."""
        at = self._at
        self._at += len(self._decoder.push(token)) if self._decoder else 0
        return at
