"""Matches names with the regular expressions of strangers, for `limited_worker.py`.

The first task is a JSON list of names; its answer is empty. Every other is a pattern; its answer is JSON: {"fits":
places in the list of the names whose beginning it fits, "seconds": processor time that this took}.
"""

import json
import re
import time
from collections.abc import Callable

MAX_ERROR = 200  # characters


def start() -> Callable[[bytes], tuple[bytes, bytes]]:
    """The function that does a task."""
    names: list[list[str]] = []

    def do(task: bytes) -> tuple[bytes, bytes]:
        if not names:
            names.append(json.loads(task))
            return b"+", b""
        began = time.process_time()
        try:
            pattern = re.compile(task.decode(errors="surrogatepass"))
        except MemoryError:
            return b"!", b""
        except Exception as error:  # re.error, and what the depth and the size of a pattern lead to
            return b"-", str(error)[:MAX_ERROR].encode(errors="surrogatepass")
        fits = [place for place, name in enumerate(names[0]) if pattern.match(name)]
        return b"+", json.dumps({"fits": fits, "seconds": time.process_time() - began}).encode()

    return do
