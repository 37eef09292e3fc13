"""The text that an evaluation is made from: pieces to score, and passages, paragraphs and sentences to ask about."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from latentkv.errors import RequestError
from latentkv.fingerprint import fingerprint
from latentkv.train.data import pieces_of, read_text

_BLANK_LINES = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"'”’]))\s+(?=[\"'“‘A-Z])")


@dataclass(frozen=True)
class Text:
    """Some texts, each as its file has it."""

    names: tuple[str, ...]
    contents: tuple[str, ...]

    @classmethod
    def read(cls, files: Sequence[Path]) -> Text:
        """Read files of UTF-8.

        Raises:
            RequestError: one is empty, or there is none.
            TrainingError: one cannot be read, named.
        """
        if not files:
            raise RequestError("--text names no file: give a UTF-8 text that the model was not trained on.")
        contents = tuple(read_text(path) for path in files)
        for path, content in zip(files, contents, strict=True):
            if not content.strip():
                raise RequestError(f"{path} holds no text: name a file of UTF-8 text.")
        return cls(tuple(path.name for path in files), contents)

    def pieces(self, num_bytes: int) -> list[str]:
        """About so much of it in pieces from all over it."""
        share = max(1, num_bytes // len(self.contents))
        return [piece for content in self.contents for piece in pieces_of(content, share) if piece]

    @cached_property
    def paragraphs(self) -> list[str]:
        """All of them, each in one line."""
        parts = (part for content in self.contents for part in _BLANK_LINES.split(content))
        return [paragraph for part in parts if (paragraph := " ".join(part.split()))]

    @cached_property
    def sentences(self) -> list[str]:
        """All of them, each in one line, cut where a sentence seems to end."""
        return [sentence for paragraph in self.paragraphs for sentence in _SENTENCE_END.split(paragraph) if sentence]

    @property
    def num_characters(self) -> int:
        """Of all of it."""
        return sum(map(len, self.contents))

    @property
    def digest(self) -> str:
        """Tells these texts from all others."""
        return fingerprint([list(self.contents)])[:16]
