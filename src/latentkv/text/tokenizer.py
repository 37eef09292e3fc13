"""Strings to token ids and back, for the tokenizer files that checkpoints bring."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from latentkv.errors import TokenizerError
from latentkv.text.backends import Backend
from latentkv.text.chat import ChatTemplate
from latentkv.text.settings import TokenizerSettings
from latentkv.text.turn_end import find_turn_end

# Texts hold none of them: what a model was never given an embedding for does no harm there.
_UNNEEDED_TOKENS = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A checkpoint's tokenizer and chat template; made by `load_tokenizer`.

    Attributes:
        vocab_size: one more than the largest token id.
        bos_id: begin of sequence, None where the checkpoint has none.
        eos_ids: ids that end a text, from the tokenizer and from `generation_config.json`.
        special_ids: ids that stand for no text (begin, end, padding, turn markers).
        added_ids: ids of tokens that are found in a text whole, before it is cut into others.
    """

    def __init__(self, backend: Backend, settings: TokenizerSettings) -> None:
        self._backend = backend
        self._settings = settings
        self.vocab_size = backend.vocab_size
        self.special_ids = backend.special_ids
        self.added_ids = backend.added_ids
        self.bos_id = self.named_id("bos_token")
        eos_id = self.named_id("eos_token")
        self.eos_ids = settings.eos_ids if eos_id is None else settings.eos_ids | {eos_id}
        # Published DeepSeek folders ask for BOS in tokenizer_config.json only, where transformers 5 no longer looks.
        frame = backend.encode("", frame=True, allow_special=False)
        self._missing_bos = [] if self.bos_id is None or self.bos_id in frame or not settings.add_bos else [self.bos_id]

    def encode(self, text: str, *, add_bos: bool | None = None, allow_special: bool = False) -> list[int]:
        """Encodes a text.

        Args:
            text: any valid Unicode text, also an empty one.
            add_bos: True puts BOS first, False adds nothing, None does what the checkpoint says (which may also
                append EOS).
            allow_special: read special tokens written in the text as such. Wanted for what a chat template made (with
                `add_bos=False`, as templates write BOS themselves), dangerous for text from strangers.

        Raises:
            TokenizerError: the text has lone surrogates, or BOS was asked of a tokenizer without one.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(f"The text is not valid Unicode: lone surrogate at {error.start}.") from None
        ids = self._backend.encode(text, frame=add_bos is None, allow_special=allow_special)
        if add_bos is None:
            return self._missing_bos + ids
        if not add_bos:
            return ids
        if self.bos_id is None:
            raise TokenizerError("This tokenizer has no begin-of-sequence token: use add_bos=False.")
        return [self.bos_id, *ids]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Decodes ids; those without a token give nothing, invalid UTF-8 gives U+FFFD.

        Raises:
            TokenizerError: an id is negative.
        """
        if any(token_id < 0 for token_id in ids):
            raise TokenizerError(f"Token ids cannot be negative: {min(ids)}.")
        return self._backend.decode(ids, skip_special=skip_special)

    def token_id(self, token: str) -> int | None:
        """The id of a token's exact text, such as "<|im_end|>", or None."""
        return self._backend.token_id(token)

    def piece(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it ("Ġthe", "▁the", "<0x0A>"), None for an id without one."""
        return self._backend.piece(token_id)

    @cached_property
    def decoder(self) -> dict[str, Any] | None:
        """How pieces become text, in the words of `tokenizer.json`."""
        return self._backend.decoder

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: so many each token of a text stands for at most."""
        return max((len(self.piece(token_id) or "") for token_id in range(self.vocab_size)), default=1)

    @cached_property
    def adds_bos(self) -> bool:
        """Whether this checkpoint's texts begin with BOS unless asked otherwise."""
        return self.bos_id is not None and self.encode("")[:1] == [self.bos_id]

    @property
    def chat_template_source(self) -> Literal["checkpoint", "plain"]:
        """Where the chat template comes from: the checkpoint, or the plain one for models that were given none."""
        return self._chat_template.source

    @property
    def chat_template_text(self) -> str:
        """The source of the template that conversations with tools are written with; "" for the plain one."""
        return self._chat_template.tools_source

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template does anything with tools."""
        return self._chat_template.takes_tools

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **json_kwargs: Any
    ) -> str:
        """Writes a conversation as the one text that the model continues; see `ChatTemplate.render`.

        Encode it with `encode(text, add_bos=False, allow_special=True)`.
        """
        return self._chat_template.render(messages, add_generation_prompt=add_generation_prompt, **json_kwargs)

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate(self._settings.chat_templates, self._settings.named_tokens, plain_bos=self.adds_bos)

    @cached_property
    def turn_end_id(self) -> int | None:
        """The token that closes a turn of the assistant's as the chat template writes it; None if there is no such."""
        if self._chat_template.source == "plain":
            return None
        return find_turn_end(self._chat_template, self._backend)

    @property
    def needed_size(self) -> int:
        """One more than the largest id that texts, turns and their ends need."""
        unneeded = {self.named_id(name) for name in _UNNEEDED_TOKENS} - {self.bos_id, *self.eos_ids}
        size = self.vocab_size
        while size and size - 1 in unneeded:
            size -= 1
        return size

    def named_token(self, name: str) -> str | None:
        """The text of `bos_token`, `eos_token`, ..., None where the checkpoint names none."""
        return self._settings.named_tokens.get(name)

    def named_id(self, name: str) -> int | None:
        """The id of `bos_token`, `eos_token`, ..., None where the checkpoint names none."""
        token = self.named_token(name)
        return None if token is None else self._backend.token_id(token)


def require_match(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Checks that a model with `vocab_size` embeddings can take every id that the tokenizer needs.

    Tokens that neither text nor its ends need, such as the one for padding, may lie past the embeddings: many published
    folders name one more than the model has, and it is never looked up.

    Raises:
        TokenizerError: the tokenizer does not match the model.
    """
    for name in ("bos_token", "eos_token"):
        token_id = tokenizer.named_id(name)
        if token_id is not None and token_id >= vocab_size:
            raise TokenizerError(
                f"tokenizer_config.json: {name} {tokenizer.named_token(name)!r} has the id {token_id}, outside the "
                f"model's vocabulary of 0 to {vocab_size - 1}: name a token that the model has."
            )
    if tokenizer.needed_size > vocab_size:
        raise TokenizerError(
            f"The tokenizer does not match the model: its ids go up to {tokenizer.needed_size - 1}, "
            f"the model's vocabulary has {vocab_size} tokens."
        )
