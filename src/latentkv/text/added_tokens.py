"""Added tokens as files list them: their texts and ids are checked before a table of that size is made."""

from typing import Any

from latentkv.errors import TokenizerError
from latentkv.token_ids import read_token_id

MOST_RESERVED = 65_536
"""Ids without a token that may lie between those with one; no published vocabulary reserves more than a few hundred."""


def require_added_token(token_id: Any, content: Any, known: int, name: str) -> None:
    """Checks one token.

    Args:
        token_id: what the file says.
        content: its text.
        known: tokens that the files list altogether.
        name: the file and the key, to begin the sentence with.

    Raises:
        TokenizerError: the text is empty, or the id is none, or far beyond all tokens that there are.
    """
    read = read_token_id(token_id, name, TokenizerError)
    if read is None:
        raise TokenizerError(f"{name} has the token {content!r:.40} without an id: correct the file.")
    if content == "":
        raise TokenizerError(f"{name} gives the id {read} to an empty text, which is found everywhere: remove it.")
    require_near(read, known, name)


def require_near(token_id: int | None, known: int, name: str) -> None:
    """Refuses an id so far beyond the number of tokens that most of a vocabulary would be empty.

    Raises:
        TokenizerError: it is.
    """
    if token_id is not None and token_id >= 2 * known + MOST_RESERVED:
        raise TokenizerError(
            f"{name} has the id {token_id:,}, far beyond the {known:,} tokens that there are: the file is damaged."
        )
