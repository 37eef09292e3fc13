"""Compiles grammars, for `limited_worker.py`.

A task is JSON: {"grammar", "vocab_size": tokens that it may ask for by number}. The answer is JSON: {"error": what is
wrong or "", "bytes": memory that the compiled grammar takes}.
"""

import json
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llguidance


class _Bytes:
    """A vocabulary of single bytes, and as many empty tokens as the model has further ones."""

    bos_token_id = None

    def __init__(self, vocab_size: int) -> None:
        self.tokens = [bytes([byte]) for byte in range(256)] + [b""] * (max(vocab_size - 256, 0) + 1)
        self.eos_token_id = len(self.tokens) - 1

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def start(limits: str, stack: str) -> Callable[[bytes], tuple[bytes, bytes]]:
    """The function that does a task; `limits` are llguidance's, `stack` bytes are what compiling may take of it."""
    parser_limits = llguidance.LLParserLimits(**json.loads(limits))
    # A stack smaller than any that the grammar will run on later: what nests too deeply fails here.
    threading.stack_size(int(stack))
    os.nice(10)

    def compile_grammar(task: dict[str, Any], result: dict[str, Any]) -> None:
        tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes(task["vocab_size"])))
        before = _resident_bytes()
        matcher = llguidance.LLMatcher(tokenizer, task["grammar"], log_level=0, limits=parser_limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        warnings = matcher.get_grammar_warnings()
        result["error"] = matcher.get_error() or (warnings[0] if warnings else "")
        result["bytes"] = max(_resident_bytes() - before, 0)

    def do(task: bytes) -> tuple[bytes, bytes]:
        result: dict[str, Any] = {}
        thread = threading.Thread(target=compile_grammar, args=(json.loads(task), result))
        thread.start()
        thread.join()
        return (b"+", json.dumps(result).encode()) if "bytes" in result else (b"!", b"")

    return do


def _resident_bytes() -> int:
    """Memory of this process; what Linux tells of its peak would be the peak of the process that started it."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
