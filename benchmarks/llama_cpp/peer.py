"""llama.cpp as a peer of `latentkv bench model`: times what a line of JSON asks for, answers with a line of JSON.

    latentkv bench model CHECKPOINT --peer "python benchmarks/llama_cpp/peer.py MODEL.gguf"

Requests, on standard input:
    {"op": "prefill", "tokens": N}              read N random tokens into an empty cache -> {"seconds": s}
    {"op": "decode", "depth": D, "tokens": N}   N steps of one token after D cached ones -> {"seconds": s}
        with "sequences": S                     steps of a token of each of S sequences
    {"op": "logits", "token_ids": [...]}        -> {"logits": [...]}, those that follow the last token
The first answer, before any request, is {"name": ..., "version": ..., "bytes": of the weights, "most_sequences": S}.

The first time that a size is asked for it runs with flash attention and without; the faster is kept from then on.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp
from kv_state import tile_state

TILE = 512
"""Tokens that are really read to fill a cache; deeper caches repeat their rows (what a row holds costs no time)."""


class Session:
    """A context over the model, with flash attention or without."""

    def __init__(
        self, model: llama_cpp.llama_model_p, *, flash: bool, threads: int, max_tokens: int, sequences: int
    ) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = max_tokens
        params.n_threads = params.n_threads_batch = threads
        params.n_seq_max = sequences
        params.kv_unified = True  # sequences share the cache, and here what was cached before a step
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.context = llama_cpp.llama_init_from_model(model, params)
        if not self.context:
            raise SystemExit("llama.cpp could not make a context.")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.depth = 0
        self.tile = b""

    def prefill(self, tokens: int) -> float:
        """Seconds to read `tokens` tokens into an empty cache."""
        self.clear()
        ids = self.random_tokens(tokens)
        started = time.perf_counter()
        self.read(ids)
        return time.perf_counter() - started

    def decode(self, depth: int, tokens: int, sequences: int) -> float:
        """Seconds of `tokens` steps of one token each; the cache is left at `depth`, ready for the next round."""
        self.fill(depth)
        for sequence in range(1, sequences):
            llama_cpp.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)
        ids = [self.random_tokens(sequences) for _ in range(tokens)]
        started = time.perf_counter()
        for step, together in enumerate(ids):
            self.read_each(together, depth + step)
        seconds = time.perf_counter() - started
        for sequence in range(1, sequences):
            llama_cpp.llama_memory_seq_rm(self.memory, sequence, -1, -1)
        llama_cpp.llama_memory_seq_rm(self.memory, 0, depth, -1)
        return seconds

    def read_each(self, token_ids: Sequence[int], position: int) -> None:
        """Read a token of each sequence, the logits of all of which are computed."""
        batch = llama_cpp.llama_batch_init(len(token_ids), 0, 1)
        batch.n_tokens = len(token_ids)
        for i, token in enumerate(token_ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, i
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_synchronize(self.context)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise SystemExit(f"llama_decode failed ({status}).")

    def fill(self, depth: int) -> None:
        """Have `depth` tokens in the cache."""
        if depth == self.depth and depth:
            return
        if depth and not self.tile:
            self.clear()
            self.read(self.random_tokens(TILE))
            self.tile = self.state()
        self.clear()
        if depth:
            blob = tile_state(self.tile, depth)
            buffer = (ctypes.c_uint8 * len(blob)).from_buffer(bytearray(blob))
            if llama_cpp.llama_state_seq_set_data(self.context, buffer, len(blob), 0) != len(blob):
                raise SystemExit(f"llama.cpp did not take a cache of {depth} tokens.")
        self.depth = depth

    def state(self) -> bytes:
        """The cache of the sequence, as llama.cpp saves it."""
        size = llama_cpp.llama_state_seq_get_size(self.context, 0)
        buffer = (ctypes.c_uint8 * size)()
        llama_cpp.llama_state_seq_get_data(self.context, buffer, size, 0)
        return bytes(buffer)

    def clear(self) -> None:
        """Forget everything."""
        llama_cpp.llama_memory_clear(self.memory, False)
        self.depth = 0

    def read(self, token_ids: Sequence[int]) -> None:
        """Read tokens after those in the cache; the logits of the last one are computed."""
        ids = (llama_cpp.llama_token * len(token_ids))(*token_ids)  # a batch points to it, and does not own it
        batch = llama_cpp.llama_batch_get_one(ids, len(token_ids))
        if status := llama_cpp.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode failed ({status}).")
        llama_cpp.llama_synchronize(self.context)

    def logits(self, token_ids: Sequence[int]) -> list[float]:
        """The logits that follow the last of `token_ids`."""
        self.clear()
        self.read(token_ids)
        return list(llama_cpp.llama_get_logits_ith(self.context, -1)[: self.vocab_size])

    def random_tokens(self, count: int) -> list[int]:
        """Tokens to read; which ones costs no time but that of their experts."""
        return random.choices(range(self.vocab_size), k=count)


def main() -> None:
    """Answer requests until whoever asks is gone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file with latent attention")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--max-tokens", type=int, default=16384 + 512, help="deepest cache, new tokens included")
    parser.add_argument("--sequences", type=int, default=1, help="that may decode together")
    parser.add_argument(
        "--no-repack",
        action="store_true",
        help="weights as the file has them: 0.3.36 repacks them for AMX, and aborts on latent attention then",
    )
    args = parser.parse_args()
    answers = _take_stdout()
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = not args.no_repack
    model = llama_cpp.llama_model_load_from_file(args.model.encode(), params)
    if not model:
        raise SystemExit(f"llama.cpp could not load {args.model}.")
    sizes = {"threads": args.threads, "max_tokens": args.max_tokens, "sequences": args.sequences}
    sessions = [Session(model, flash=flash, **sizes) for flash in (False, True)]
    answer = lambda content: print(json.dumps(content), file=answers, flush=True)  # noqa: E731
    answer(
        {
            "name": "llama.cpp",
            "version": llama_cpp.__version__,
            "bytes": llama_cpp.llama_model_size(model),
            "most_sequences": args.sequences,
        }
    )
    faster: dict[tuple[str, int, int], Session] = {}
    requests = _requests()
    while True:
        request = json.loads(requests.get())
        if request["op"] == "logits":
            answer({"logits": sessions[0].logits(request["token_ids"])})
            continue
        size, time_on = _case(request)
        key = (request["op"], size, request.get("sequences", 1))
        if key not in faster:
            times = {time_on(session): session for session in sessions}
            faster[key] = times[min(times)]
        answer({"seconds": time_on(faster[key]), "flash_attention": faster[key] is sessions[1]})


def _case(request: dict[str, Any]) -> tuple[int, Callable[[Session], float]]:
    """The size that a request is about, and how to time it."""
    if request["op"] == "prefill":
        return request["tokens"], lambda session: session.prefill(request["tokens"])
    asked = request["depth"], request["tokens"], request.get("sequences", 1)
    return request["depth"], lambda session: session.decode(*asked)


def _requests() -> queue.SimpleQueue[str]:
    """Lines as they come. Their end ends this process at once: a benchmark that was killed waits for nothing."""
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            requests.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return requests


def _take_stdout():
    """The standard output for answers alone: what llama.cpp prints goes to standard error from here on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    main()
