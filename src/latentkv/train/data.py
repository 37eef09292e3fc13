"""Text files -> token files on disk, and the pieces of text that are held out for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latentkv.errors import TrainingError
from latentkv.files import write_json, write_whole
from latentkv.fingerprint import fingerprint
from latentkv.resumable import found_in

BLOCK_CHARACTERS = 1 << 20
EVAL_PIECES_PER_FILE = 8

_REMEDY = "remove it, and the text is encoded again"


@dataclass(frozen=True)
class Corpus:
    """The documents to train on and to evaluate on, as text files and ranges of their characters.

    Attributes:
        training: (file, end): a document is the first `end` characters of the file (None: all of it).
        evaluation: (file, texts held out of it).
    """

    training: tuple[tuple[Path, int | None], ...]
    evaluation: tuple[tuple[Path, tuple[str, ...]], ...]

    def training_texts(self) -> Iterator[str]:
        """One document at a time."""
        for path, end in self.training:
            yield read_text(path)[:end]


def read_text(path: Path) -> str:
    """A UTF-8 file, or an error that names it."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"Cannot read {path} as UTF-8 text: {error}.") from error


def find_corpus(
    data: Path,
    *,
    exclude: Sequence[str] = (),
    eval_files: Sequence[Path] = (),
    eval_fraction: float = 0.01,
    eval_bytes: int = 200_000,
) -> Corpus:
    """List what is to be read.

    Args:
        data: a folder of .txt files (searched recursively), or one text file.
        exclude: file names left out of training and of the tokenizer; each must exist.
        eval_files: texts to evaluate on; when given, nothing is held out of `data`.
        eval_fraction: else, this much of each document's end is held out.
        eval_bytes: about how many bytes to evaluate in all, spread over the files.
    """
    files = sorted(data.rglob("*.txt")) if data.is_dir() else [data]
    unknown = sorted(set(exclude) - {f.name for f in files})
    if unknown:
        raise TrainingError(f"--exclude names {', '.join(unknown)}, which {data} does not hold.")
    evaluated = {f.resolve() for f in eval_files}
    files = [f for f in files if f.name not in exclude and f.resolve() not in evaluated]
    if not files:
        raise TrainingError(f"{data} holds no .txt file to train on: give a folder of UTF-8 text files, or one file.")
    if eval_files:
        names = [f.stem for f in eval_files]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise TrainingError(
                f"Two of the --eval-file texts have the name {repeated[0]}: results go by name, rename one."
            )
        share = max(1, eval_bytes // len(eval_files))
        held_out = tuple((f, pieces_of(read_text(f), share)) for f in eval_files)
        if empty := [str(path) for path, texts in held_out if not any(texts)]:
            raise TrainingError(f"--eval-file {empty[0]} is empty: give a text to evaluate on.")
        return Corpus(tuple((f, None) for f in files), held_out)
    if not 0 <= eval_fraction < 1:
        raise TrainingError(f"--eval-fraction must be at least 0 and below 1, not {eval_fraction}.")
    training: list[tuple[Path, int | None]] = []
    evaluation: list[tuple[Path, tuple[str, ...]]] = []
    share = max(1, eval_bytes // len(files))
    for path in files:
        text = read_text(path)
        end = len(text) - int(len(text) * eval_fraction)
        training.append((path, end))
        if text[end:]:
            evaluation.append((path, (text[end : end + share],)))
    return Corpus(tuple(training), tuple(evaluation))


def pieces_of(text: str, characters: int) -> tuple[str, ...]:
    """About `characters` of the text in equal pieces from all over it."""
    if len(text) <= characters:
        return (text,)
    piece = max(1, characters // EVAL_PIECES_PER_FILE)
    starts = [i * len(text) // EVAL_PIECES_PER_FILE for i in range(EVAL_PIECES_PER_FILE)]
    return tuple(text[s : s + piece] for s in starts)


def blocks(text: str) -> Iterator[str]:
    """The text in pieces that end with a line, so that a tokenizer never meets the whole of a long one."""
    start = 0
    while start < len(text):
        end = min(len(text), start + BLOCK_CHARACTERS)
        newline = text.rfind("\n", start, end)
        if end < len(text) and newline > start:
            end = newline + 1
        yield text[start:end]
        start = end


def write_tokens(
    path: Path, corpus: Corpus, encode: Callable[[str], list[int]], separator: int, vocab_size: int, tokenizer: str
) -> NDArray[np.uint16 | np.uint32]:
    """The training documents as one memory-mapped array of ids, each document after `separator`.

    The file is reused when it was made from the same texts with the same tokenizer.

    Args:
        path: where; `path` + ".json" describes it.
        corpus: its training documents are written.
        encode: text -> ids, without special tokens.
        separator: the id before each document (begin of sequence).
        vocab_size: ids are stored as uint16 where they fit, else as uint32.
        tokenizer: its fingerprint.
    """
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    meta_path = path.with_name(path.name + ".json")
    texts = (text.encode() for text in corpus.training_texts())
    identity = {"sha256": fingerprint(chain([tokenizer.encode()], texts))}
    if not path.exists() or found_in(meta_path, identity, dict, TrainingError, _REMEDY) is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        meta_path.unlink(missing_ok=True)
        size = 0

        def write(temporary: Path) -> None:
            nonlocal size
            with temporary.open("wb") as file:
                for text in corpus.training_texts():
                    file.write(np.array([separator], dtype).tobytes())
                    for block in blocks(text):
                        file.write(np.asarray(encode(block), dtype).tobytes())
                    size += len(text.encode())

        write_whole(path, write)
        tokens = path.stat().st_size // np.dtype(dtype).itemsize
        write_json(meta_path, identity | {"tokens": tokens, "bytes": size, "documents": len(corpus.training)})
    return np.memmap(path, dtype=dtype, mode="r")
