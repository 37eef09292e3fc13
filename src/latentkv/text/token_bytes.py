"""What each token adds to a text, in bytes."""

from latentkv.errors import TokenizerError
from latentkv.text.decoders import build_steps
from latentkv.text.tokenizer import Tokenizer


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each token id in the middle of a text; b"" for special tokens and ids without a token.

    Raises:
        TokenizerError: the tokenizer's decoder works on whole texts only.
    """
    steps = build_steps(tokenizer.decoder)
    if steps is None:
        raise TokenizerError("This tokenizer's tokens stand for no text of their own: structured output cannot be had.")

    def content(token_id: int) -> bytes:
        piece = None if token_id in tokenizer.special_ids else tokenizer.piece(token_id)
        if piece is None:
            return b""
        for step in steps:
            inside = step.inside(piece)
            if isinstance(inside, bytes):
                return inside
            piece = inside
        return piece.encode()

    return [content(token_id) for token_id in range(tokenizer.vocab_size)]
