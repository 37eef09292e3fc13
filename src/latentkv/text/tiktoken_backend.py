"""`tiktoken.model` vocabularies (Kimi-K2, Moonlight), read without running code that a checkpoint brings along."""

import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from latentkv.errors import TokenizerError
from latentkv.files import read_bytes
from latentkv.json_files import INDEX_BYTES
from latentkv.libraries import errors_as
from latentkv.text.added_tokens import require_added_token
from latentkv.text.decoders import BYTE_CHARACTERS
from latentkv.text.known_patterns import KIMI
from latentkv.text.settings import TokenizerSettings

# The ids reserved for special tokens above the ranks of Kimi-K2 and Moonlight, as stated in `tokenization_kimi.py` and
# `tokenization_moonshot.py` of the published repositories. A checkpoint cannot bring a pattern of its own.
RESERVED_TOKENS = 256
_RANK_DIGITS = 9
# The regular expression engine overflows its stack on very long runs, so they are cut as the published code does.
MAX_RUN = 25_000
RUN = re.compile(r"\s+|\S+")  # all of a run at once: looking for 25,000 from every character on would take minutes


class TiktokenBackend:
    """A file of base64 tokens and ranks; special tokens come from `added_tokens_decoder`, gaps are reserved."""

    def __init__(self, path: Path, settings: TokenizerSettings) -> None:
        ranks = _read_ranks(path)
        added = _added(ranks, settings)
        last = max((len(ranks) + RESERVED_TOKENS - 1, *added))
        specials = {added.get(i, f"<|reserved_token_{i}|>"): i for i in range(len(ranks), last + 1)}
        if len(specials) != last + 1 - len(ranks):
            raise TokenizerError(f"{settings.added_tokens_file} names a token as reserved ones are named: rename it.")
        with errors_as(TokenizerError, f"Cannot build a tokenizer from {path}"):
            self._encoding = tiktoken.Encoding(path.name, pat_str=KIMI, mergeable_ranks=ranks, special_tokens=specials)
        plain = {token_id for token_id, token in settings.added_tokens.items() if not token.special}
        self.special_ids = frozenset(specials.values()) - plain
        self.added_ids = frozenset(specials.values())
        self._specials = specials
        self._plain = frozenset(name for name, token_id in specials.items() if token_id in plain)
        self.vocab_size = last + 1
        self.decoder: dict[str, Any] | None = {"type": "ByteLevel"}

    def encode(self, text: str, *, frame: bool, allow_special: bool) -> list[int]:
        """See `Backend.encode`; such a file says nothing about a frame."""
        allowed = self._specials.keys() if allow_special else self._plain
        with errors_as(TokenizerError, "The tokenizer cannot encode this text", "change the text"):
            return [
                token_id
                for part in _cut_long_runs(text)
                for token_id in self._encoding.encode(part, allowed_special=set(allowed), disallowed_special=())
            ]

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """See `Backend.decode`."""
        known = [i for i in ids if 0 <= i < self.vocab_size and not (skip_special and i in self.special_ids)]
        with errors_as(TokenizerError, "The tokenizer cannot decode these ids"):
            return self._encoding.decode(known, errors="replace")

    def token_id(self, token: str) -> int | None:
        """See `Backend.token_id`."""
        if token in self._specials:
            return self._specials[token]
        try:
            return self._encoding.encode_single_token(token)
        except KeyError:
            return None

    def piece(self, token_id: int) -> str | None:
        """See `Backend.piece`: bytes are written as byte-level characters."""
        if not 0 <= token_id < self.vocab_size:
            return None
        return "".join(BYTE_CHARACTERS[byte] for byte in self._encoding.decode_single_token_bytes(token_id))


def _added(ranks: dict[bytes, int], settings: TokenizerSettings) -> dict[int, str]:
    """The added tokens by id: none empty, none twice, none with an id of the ranks or far beyond them."""
    name, found = settings.added_tokens_file, dict[int, str]()
    for token_id, token in settings.added_tokens.items():
        require_added_token(token_id, token.content, len(ranks) + len(settings.added_tokens), name)
        if token_id < len(ranks):
            if token.content.encode() != next(piece for piece, rank in ranks.items() if rank == token_id):
                raise TokenizerError(f"{name} gives {token.content!r} the id {token_id}, which is that of a rank.")
        elif token.content in found.values():
            raise TokenizerError(f"{name} gives two ids to the token {token.content!r:.40}: remove one of them.")
        else:
            found[token_id] = token.content
    return found


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    try:
        for line in read_bytes(path, TokenizerError, INDEX_BYTES).splitlines():
            if line.strip():
                token, rank = line.split()
                if len(rank) > _RANK_DIGITS:
                    raise ValueError(f"a rank of {len(rank)} digits")
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        raise TokenizerError(f"{path} is not a tiktoken file of base64 tokens and ranks: {error}.") from error
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(f"The ranks in {path} do not run from 0 without gaps: the file is truncated or damaged.")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise TokenizerError(f"{path} lacks some of the 256 single bytes: the file is truncated or damaged.")
    return ranks


def _cut_long_runs(text: str) -> Iterator[str]:
    start = 0
    for run in RUN.finditer(text) if len(text) > MAX_RUN else ():
        for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]
