"""The two libraries that do the encoding, behind one small interface: `tokenizers` and `tiktoken`."""

import json
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol, cast

import tokenizers

from latentkv.errors import TokenizerError
from latentkv.libraries import errors_as
from latentkv.text.added_tokens import require_added_token
from latentkv.text.encoding_process import EncodingProcesses
from latentkv.text.foreign_steps import ForeignSteps
from latentkv.text.settings import TokenizerSettings

SHORT = 4096
"""Characters or ids that take no time to speak of. For more, `tokenizers` is called so that it lets other threads run,
which it does for batches only; a batch of one costs more than the text itself where that is short."""


class Backend(Protocol):
    """What `Tokenizer` needs from a library."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode(..., skip_special=True)` leaves out."""
        ...

    @property
    def added_ids(self) -> frozenset[int]:
        """Ids of tokens that are found in a text whole, before it is cut into others."""
        ...

    @property
    def decoder(self) -> dict[str, Any] | None:
        """How pieces become text, in the words of `tokenizer.json`."""
        ...

    def encode(self, text: str, *, frame: bool, allow_special: bool) -> list[int]:
        """Encodes; `frame` adds what `tokenizer.json` puts around a text, `allow_special` reads special tokens."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """Decodes; ids that have no token are left out."""
        ...

    def token_id(self, token: str) -> int | None:
        """The id of a token's text."""
        ...

    def piece(self, token_id: int) -> str | None:
        """The token as the decoder takes it, None for an id without a token."""
        ...


class HuggingFaceBackend:
    """What the `tokenizers` library encodes: a `tokenizer.json`, or what was put together from other files.

    Args:
        tokenizer: of the library.
        settings: of the folder; its added tokens are added.
        foreign: steps that are done in processes with limits, for all texts or for long ones.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, settings: TokenizerSettings, foreign: ForeignSteps | None = None
    ) -> None:
        self._tokenizer, self._foreign = tokenizer, foreign
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        known = tokenizer.get_vocab_size(with_added_tokens=True) + len(settings.added_tokens)
        for token_id, token in settings.added_tokens.items():
            require_added_token(token_id, token.content, known, settings.added_tokens_file)
        with errors_as(TokenizerError, f"Cannot add the tokens of {settings.added_tokens_file} to the tokenizer"):
            _add_tokens(self._tokenizer, settings)
        # Whether special tokens in the text are parsed is a switch of the shared object, not an argument.
        self._switch = threading.Lock()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.added_ids = frozenset(added)

    @property
    def decoder(self) -> dict[str, Any] | None:
        """The decoder's own JSON, without serialising the vocabulary with it."""
        decoder = self._tokenizer.decoder
        return None if decoder is None else cast(dict[str, Any], json.loads(decoder.__getstate__()))

    def encode(self, text: str, *, frame: bool, allow_special: bool) -> list[int]:
        """See `Backend.encode`."""
        if self._foreign is not None and (self._foreign.always or len(text) > SHORT):
            return self._processes.encode(text, frame=frame, allow_special=allow_special)
        with self._switch, errors_as(TokenizerError, "The tokenizer cannot encode this text", "change the text"):
            self._tokenizer.encode_special_tokens = not allow_special
            if len(text) <= SHORT:
                return self._tokenizer.encode(text, add_special_tokens=frame).ids
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=frame)[0].ids

    @cached_property
    def _processes(self) -> EncodingProcesses:
        if self._foreign is None:
            raise RuntimeError("nothing is foreign")
        with self._switch:  # while nobody else uses the object
            return EncodingProcesses(self._tokenizer, self._foreign)

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """See `Backend.decode`."""
        if len(ids) <= SHORT:
            with errors_as(TokenizerError, "The tokenizer cannot decode these ids"):
                return self._tokenizer.decode(ids, skip_special_tokens=skip_special)
        with errors_as(TokenizerError, "The tokenizer cannot decode these ids"):
            return self._tokenizer.decode_batch([ids], skip_special_tokens=skip_special)[0]

    def token_id(self, token: str) -> int | None:
        """See `Backend.token_id`."""
        return self._tokenizer.token_to_id(token)

    def piece(self, token_id: int) -> str | None:
        """See `Backend.piece`."""
        return self._tokenizer.id_to_token(token_id)


def _add_tokens(tokenizer: tokenizers.Tokenizer, settings: TokenizerSettings) -> None:
    """Adds what only the files beside it list, and marks their special tokens as such.

    A special token that has no id gets the next one, as in `transformers`.
    """
    present = tokenizer.get_added_tokens_decoder()
    for token_id, token in sorted(settings.added_tokens.items()):
        if repr(present.get(token_id)) != repr(token):
            tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != token_id:
            raise TokenizerError(
                f"{settings.added_tokens_file} gives the token {token.content!r} the id {token_id}, and the vocabulary "
                f"beside it {tokenizer.token_to_id(token.content)}: take both files from the same checkpoint."
            )
    already = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    tokenizer.add_special_tokens([token for token in settings.special_tokens if token.content not in already])
