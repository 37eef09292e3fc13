"""`EncodingProcesses`: texts are encoded with patterns of strangers in processes with limits on time and memory."""

from __future__ import annotations

import json
from array import array
from pathlib import Path

import tokenizers

from latentkv.errors import TokenizerError
from latentkv.limited_process import LimitedProcesses, LimitError, RefusedError, Task
from latentkv.text.foreign_steps import ForeignSteps

ENCODE_SECONDS, ENCODE_SECONDS_PER_CHARACTER = 1.0, 3e-6
"""Processor time that a text may take; what is honest takes about a third of a character's share."""

READ_SECONDS, READ_SECONDS_PER_BYTE = 1.0, 5e-7
"""Processor time that it may take to read the tokenizer, by the size of its JSON."""

ENCODE_MEMORY, ENCODE_MEMORY_PER_BYTE = 1 << 30, 32
"""Bytes of address space of a process, by the size of the tokenizer's JSON."""

WAIT = 10
"""Times as long as its processor time a task may take, on a machine that is busy otherwise."""

_WORKER = Path(__file__).with_name("encoding_worker.py")


class EncodingProcesses:
    """Processes for one tokenizer, started when there is a text; use them from any thread.

    Args:
        tokenizer: whose vocabulary, added tokens and frame are final.
        steps: how texts are normalised and cut before.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, steps: ForeignSteps) -> None:
        self._cause = steps.cause
        whole = json.loads(tokenizer.to_str())
        whole |= {"normalizer": steps.normalizer, "pre_tokenizer": steps.pre_tokenizer}
        first = b"t" + json.dumps(whole).encode()
        self._read_seconds = READ_SECONDS + READ_SECONDS_PER_BYTE * len(first)
        self._memory = ENCODE_MEMORY + ENCODE_MEMORY_PER_BYTE * len(first)
        self._processes = LimitedProcesses(
            _WORKER,
            ["tokenizers"],
            memory=self._memory,
            first=Task(first, self._read_seconds, WAIT * self._read_seconds),
        )

    def encode(self, text: str, *, frame: bool, allow_special: bool) -> list[int]:
        """The ids of a text; see `Backend.encode`.

        Raises:
            TokenizerError: it takes more than it may, or the tokenizer cannot be read.
        """
        task = (b"F" if frame else b"-") + (b"S" if allow_special else b"-") + text.encode()
        seconds = ENCODE_SECONDS + ENCODE_SECONDS_PER_CHARACTER * len(text)
        try:
            return array("I", self._processes.ask(Task(task, seconds, WAIT * seconds))).tolist()
        except RefusedError as refused:
            did = "be read" if refused.first else "encode this text"
            raise TokenizerError(
                f"The tokenizer cannot {did} ({refused}): change {self._cause} in its tokenizer.json"
                f"{'' if refused.first else ', or the text'}."
            ) from None
        except LimitError as over:
            raise TokenizerError(self._over(over, self._read_seconds if over.first else seconds)) from None
        except OSError as error:
            raise TokenizerError(f"No process can be started to encode this text ({error}): try again.") from error

    def _over(self, over: LimitError, seconds: float) -> str:
        what = "To read the tokenizer" if over.first else "To encode this text"
        took = {
            "time": f"takes more than {seconds:.1f} s",
            "memory": f"takes more than {self._memory >> 20} MiB",
            "end": f"ended its process, as more than {self._memory >> 20} MiB would",
            "wait": f"did not end within {WAIT * seconds:.0f} s",
        }[over.limit]
        remedy = "change" if over.first else "shorten the text, or change"
        return f"{what} {took}: {remedy} {self._cause} in its tokenizer.json."
