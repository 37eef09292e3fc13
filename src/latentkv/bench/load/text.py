"""Text that prompts are cut from: words drawn with a seed, or a file of one's own."""

from __future__ import annotations

from pathlib import Path
from random import Random

from latentkv.errors import RequestError

_GENERATED_WORDS = 100_000
_WORDS = """
the of and to in that it was his he with as had for on is but at her not be they from have this which she by or one
all there were so when their would been said what who them him into more will out if no then some up could now about
time down little man over old before great than like other long upon very day after any its only made well people way
still see first water hand never here house came much where too under back light night good found world eyes again
years these should head might life own without left went thought each name against place such while three morning
young called last small through river between stone evening window garden letter winter captain mountain question
silence company harbour kitchen weather village music paper silver answer corner distance bridge market shadow table
journey summer island forest engine station church picture colour number measure
"""


def generated_text(seed: int) -> str:
    """About 600,000 characters of common words, the same for the same seed."""
    return " ".join(Random(f"{seed} words").choices(_WORDS.split(), k=_GENERATED_WORDS))


def read_text(file: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        RequestError: it is missing, no UTF-8, or holds nothing but white space.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file} cannot be read as UTF-8 text ({error}); give another --text.") from None
    if not text.strip():
        raise RequestError(f"{file} holds no text to cut prompts from; give another --text.")
    return text


def cut(text: str, start: int, length: int) -> str:
    """`length` characters of `text` from `start` on, which goes round to the beginning at its end."""
    piece = text[start : start + length]
    missing = length - len(piece)
    return piece + (text * (missing // len(text) + 1))[:missing] if missing else piece
