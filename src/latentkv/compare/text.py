"""The text of a comparison: whole books held out, one tokenizer and one file of tokens for all runs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from latentkv.errors import RequestError
from latentkv.fingerprint import fingerprint
from latentkv.text import has_tokenizer, load_tokenizer
from latentkv.text.bpe_trainer import save_tokenizer, train_bpe
from latentkv.train.data import Corpus, find_corpus
from latentkv.train.evaluate import EvalSet, eval_sets


@dataclass(frozen=True)
class Text:
    """What is trained on, and what is measured on.

    Attributes:
        data: a folder of .txt files, or one.
        eval_files: held out of training and of the tokenizer.
        eval_bytes: about how much of them to measure on.
        corpus: both, found.
    """

    data: Path
    eval_files: tuple[Path, ...]
    eval_bytes: int
    corpus: Corpus

    @classmethod
    def find(cls, data: Path, eval_files: Sequence[Path], eval_bytes: int) -> Text:
        """Look at what there is.

        Raises:
            RequestError: nothing is held out.
            TrainingError: there is no text, or it cannot be read.
        """
        if not eval_files:
            raise RequestError("--eval-file must name a text to measure on; it is held out of training.")
        corpus = find_corpus(data, eval_files=eval_files, eval_bytes=eval_bytes)
        return cls(data, tuple(eval_files), eval_bytes, corpus)

    def digest(self) -> str:
        """A hash of all of it."""
        training = (_digest(text) for text in self.corpus.training_texts())
        evaluation = (
            part for path, texts in self.corpus.evaluation for part in (path.stem.encode(), *map(_digest, texts))
        )
        return fingerprint(chain(training, evaluation))

    def train_tokenizer(self, folder: Path, vocab_size: int) -> None:
        """A byte-level BPE of the training text, unless `folder` holds one."""
        if not has_tokenizer(folder):
            save_tokenizer(train_bpe(self.corpus.training_texts(), vocab_size), folder)

    def held_out(self, tokenizer_folder: Path) -> HeldOut:
        """What is measured on, encoded as the trainer encodes it."""
        tokenizer = load_tokenizer(tokenizer_folder)
        return HeldOut(
            tuple(eval_sets(self.corpus, lambda text: tokenizer.encode(text, add_bos=False), separator=0, merged=False))
        )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@dataclass(frozen=True)
class HeldOut:
    """The texts to measure on."""

    sets: tuple[EvalSet, ...]

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all of them."""
        return sum(one.num_bytes for one in self.sets)

    @property
    def num_tokens(self) -> int:
        """Tokens that are predicted; the separator before each piece is not."""
        return sum(len(document) - 1 for one in self.sets for document in one.documents)

    def mean_bits(self, bits_per_byte: Mapping[str, float]) -> float:
        """Bits a byte of all texts together, of those of each."""
        return sum(bits_per_byte[one.name] * one.num_bytes for one in self.sets) / self.num_bytes

    def loss(self, bits_per_byte: float) -> float:
        """Nats a token of all texts together."""
        return bits_per_byte * math.log(2) * self.num_bytes / self.num_tokens
