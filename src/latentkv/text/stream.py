"""Text as tokens arrive: never half a character, and in the end exactly what decoding all tokens at once gives."""

from collections.abc import Collection

from latentkv.text.decoders import build_steps
from latentkv.text.tokenizer import Tokenizer


class StreamDecoder:
    """Turns a stream of token ids into text.

    `"".join(pushes) + finish() == tokenizer.decode(ids)`, whatever the ids, as long as nothing is kept. A push costs
    the token's own length. Text is held back only while later tokens could still change it: within a UTF-8 character,
    within a run of byte-fallback tokens, and, for the rare decoder that can only work on whole texts, until `finish`.

    Args:
        tokenizer: the tokenizer of the ids.
        skip_special: leave special tokens out of the text, as `Tokenizer.decode` does.
        keep: texts of special tokens that stay in all the same, such as the markers of tool calls. Only these, so that
            no end or turn token ever reaches a reader.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, keep: Collection[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._skipped = (tokenizer.special_ids if skip_special else frozenset()) - set(map(tokenizer.token_id, keep))
        self._steps = build_steps(tokenizer.decoder)
        self._held_ids: list[int] = []

    def push(self, token_id: int) -> str:
        """Takes the next token and returns the text that it makes certain, often none."""
        if token_id in self._skipped:
            return ""
        if self._steps is None:
            self._held_ids.append(token_id)
            return ""
        piece = self._tokenizer.piece(token_id)
        if piece is None:
            return ""
        return self._feed([piece], last=False)

    def finish(self) -> str:
        """Returns the text still held; half a character becomes U+FFFD. The stream is then at an end."""
        if self._steps is None:
            return self._tokenizer.decode(self._held_ids, skip_special=False)
        return self._feed([], last=True)

    def _feed(self, pieces: list[str], *, last: bool) -> str:
        for step in self._steps or []:
            pieces = step.feed(pieces, last)
        return "".join(pieces)
