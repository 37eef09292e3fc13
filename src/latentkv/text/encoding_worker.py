"""Encodes texts with a tokenizer of strangers, for `limited_worker.py`.

The first task is the tokenizer: "t" and a `tokenizer.json`; its answer is empty. Every other is a text: two letters, F
or - (whether the frame is added) and S or - (whether special tokens in it are read as such), and the text; its answer
are the ids, 4 bytes each.
"""

import os
from array import array
from collections.abc import Callable

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the limits are those of one thread

import tokenizers

MAX_ERROR = 300  # characters


def start() -> Callable[[bytes], tuple[bytes, bytes]]:
    """The function that does a task."""
    read: list[tokenizers.Tokenizer] = []

    def do(task: bytes) -> tuple[bytes, bytes]:
        try:
            if not read:
                read.append(tokenizers.Tokenizer.from_buffer(task[1:]))
                return b"+", b""
            return b"+", _encode(read[0], task)
        except MemoryError:
            return b"!", b""
        except BaseException as error:  # the library raises bare exceptions, and panics that are none
            return b"-", " ".join(str(error).split())[:MAX_ERROR].encode(errors="replace")

    return do


def _encode(tokenizer: tokenizers.Tokenizer, task: bytes) -> bytes:
    tokenizer.encode_special_tokens = task[1:2] != b"S"
    # A batch of one, as only for these are no offsets written.
    (encoding,) = tokenizer.encode_batch_fast([task[2:].decode()], add_special_tokens=task[:1] == b"F")
    return array("I", encoding.ids).tobytes()
