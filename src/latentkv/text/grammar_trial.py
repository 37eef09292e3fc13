"""Compiles one grammar in a process of its own, which its limits on time, memory and stack may end.

Run as a file, it knows only llguidance. It reads {"grammar", "vocab_size", "limits", "seconds", "memory", "stack"} from
stdin, and writes {"error": what is wrong or "", "bytes": memory that the compiled grammar takes}.
"""

import json
import os
import resource
import sys
import threading
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


def main() -> None:
    """Read one grammar, compile it for a vocabulary of single bytes, and write how that went."""
    task: dict[str, Any] = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (task["seconds"], task["seconds"]))
    resource.setrlimit(resource.RLIMIT_AS, (task["memory"], task["memory"]))
    os.nice(10)
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes(task["vocab_size"])))
    limits = llguidance.LLParserLimits(**task["limits"])
    result: dict[str, Any] = {}

    def compile_grammar() -> None:
        before = _resident_bytes()
        matcher = llguidance.LLMatcher(tokenizer, task["grammar"], log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        warnings = matcher.get_grammar_warnings()
        result["error"] = matcher.get_error() or (warnings[0] if warnings else "")
        result["bytes"] = max(_resident_bytes() - before, 0)

    # A stack smaller than any that the grammar will run on later: what nests too deeply fails here.
    threading.stack_size(task["stack"])
    thread = threading.Thread(target=compile_grammar)
    thread.start()
    thread.join()
    if "bytes" not in result:
        sys.exit(1)
    json.dump(result, sys.stdout)


def _resident_bytes() -> int:
    """Memory of this process; what Linux tells of its peak would be the peak of the process that started it."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
