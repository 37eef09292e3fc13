"""docs/reliability.md, lines 6, 7 and 8 for a while: many clients who ask, leave in the middle, and ask nonsense."""

from __future__ import annotations

import http.client
import json
import random
import socket
import statistics
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
import torch

from latentkv import LLM, SamplingParams
from latentkv.completion import TextOutput
from latentkv.engine import NextToken, sample
from server_process import ServerProcess, server_process

CLIENTS = 32
LONGEST = 24
PROMPTS = [
    "It was a dark night",
    "The whale",
    "Chapter 1. " + "The ship lay at anchor, and nobody on board had spoken since the morning. " * 8,
    "Chapter 1. " + "The ship lay at anchor, and nobody on board had spoken since the morning. " * 20 + "Then",
]
CASES = [(prompt, seed) for prompt in PROMPTS for seed in (None, 1, 2)]  # None: greedy
NONSENSE: list[tuple[str, Any]] = [
    ("/v1/completions", {"prompt": "x", "temperature": -1}),
    ("/v1/completions", {"prompt": [1 << 30]}),
    ("/v1/completions", {}),
    ("/v1/completions", {"prompt": "x", "structured_outputs": {"regex": "("}}),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}),
    ("/v1/chat/completions", {"messages": "x"}),
    ("/v1/nothing", {}),
]


@pytest.fixture(scope="module")
def answers() -> list[list[int]]:
    """The tokens of each case, none of which differs from what the dense model, without cache and batch, would choose.

    The dense model reads each answer once: where it agrees with every token, it would have written the same.
    """
    llm = LLM(dtype="fp32", kv_cache_bytes=16 << 20)
    answers: list[list[int]] = []
    for prompt, seed in CASES:
        params = SamplingParams(
            max_tokens=LONGEST, temperature=0.0 if seed is None else 1.0, seed=seed or 0, ignore_eos=True
        )
        (said,) = llm.generate(prompt, params)
        tokens, first = [*said.prompt_token_ids, *said.token_ids], len(said.prompt_token_ids)
        with torch.inference_mode():
            logits = llm.decoder.logits(llm.decoder.forward_train(torch.tensor([tokens]))[0]).float()
        for at in range(first, len(tokens)):
            assert sample(logits[at - 1 : at], [NextToken(params, seed or 0, tokens[:at])]) == [tokens[at]]
        answers.append(said.token_ids)
    return answers


@dataclass
class Tally:
    """What the clients saw."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: Counter[str] = field(default_factory=Counter[str])
    wrong: list[Any] = field(default_factory=list[Any])
    health: list[float] = field(default_factory=list[float])  # seconds that an answer took
    whole: list[float] = field(default_factory=list[float])  # and of completions

    def add(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1


class Client:
    def __init__(self, server: ServerProcess, number: int, texts: dict[tuple[int, int], str], tally: Tally) -> None:
        self.server, self.texts, self.tally = server, texts, tally
        self.random = random.Random(number)

    def run_until(self, end: float) -> None:
        while time.monotonic() < end:
            action = self.random.choices([self.ask, self.stream, self.leave, self.nonsense], [5, 5, 3, 2])[0]
            try:
                action()
            except (OSError, http.client.HTTPException, AssertionError) as error:
                with self.tally.lock:
                    self.tally.wrong.append((action.__name__, repr(error)))

    def body(self) -> tuple[tuple[int, int], dict[str, Any]]:
        case, length = self.random.randrange(len(CASES)), self.random.randint(1, LONGEST)
        prompt, seed = CASES[case]
        sampling = {"temperature": 0} if seed is None else {"temperature": 1, "seed": seed}
        return (case, length), {"prompt": prompt, "max_tokens": length, "ignore_eos": True, **sampling}

    def ask(self) -> None:
        key, body = self.body()
        began = time.monotonic()
        status, answer = self.server.ask("POST", "/v1/completions", body, timeout=60)
        assert status == 200, answer
        assert answer["choices"][0]["text"] == self.texts[key], (key, answer)
        self.tally.add("asked")
        self.tally.whole.append(time.monotonic() - began)

    def stream(self) -> None:
        key, body = self.body()
        status, text = self.server.ask("POST", "/v1/completions", {**body, "stream": True}, timeout=60)
        assert status == 200 and text.endswith("data: [DONE]\n\n"), text
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == self.texts[key], key
        self.tally.add("streamed")

    def leave(self) -> None:
        _, body = self.body()
        data = json.dumps({**body, "max_tokens": 2000, "stream": self.random.random() < 0.5}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        )
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=60) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + data)
            time.sleep(self.random.random() * 0.3)
        self.tally.add("left")

    def nonsense(self) -> None:
        path, body = self.random.choice(NONSENSE)
        status, answer = self.server.ask("POST", path, body, timeout=60)
        assert 400 <= status < 500, (path, body, status, answer)
        self.tally.add("refused")


def watch_health(server: ServerProcess, end: float, tally: Tally) -> None:
    while time.monotonic() < end:
        began = time.monotonic()
        status, _ = server.ask("GET", "/health", timeout=60)
        assert status == 200
        tally.health.append(time.monotonic() - began)
        time.sleep(0.05)


@pytest.mark.parametrize("seconds", [4, pytest.param(600, marks=pytest.mark.slow)])
def test_lines_06_07_and_08_32_clients_get_right_answers_and_leave_no_trace(
    answers: list[list[int]], seconds: int
) -> None:
    llm = LLM(dtype="fp32", kv_cache_bytes=1 << 20)

    def text_of(case: int, length: int) -> str:
        params = SamplingParams(max_tokens=length)
        output = TextOutput(llm.tokenizer, llm.request(CASES[case][0], params))
        for token in answers[case][:length]:
            output.push(token)
        output.finish()
        return output.take()

    texts = {(case, length): text_of(case, length) for case in range(len(CASES)) for length in range(1, LONGEST + 1)}
    tally = Tally()
    # So small a cache that requests wait for each other, are preempted, and lose known prefixes.
    with server_process("--dtype", "fp32", "--kv-cache-bytes", "6MiB", "--max-running", "24") as server:
        process = psutil.Process(server.process.pid)
        end = time.monotonic() + seconds
        warm = time.monotonic() + seconds / 3
        clients = [Client(server, number, texts, tally) for number in range(CLIENTS)]
        threads = [threading.Thread(target=client.run_until, args=(end,)) for client in clients]
        threads.append(threading.Thread(target=watch_health, args=(server, end, tally)))
        for thread in threads:
            thread.start()
        time.sleep(max(warm - time.monotonic(), 0))
        before = process.memory_info().rss
        for thread in threads:
            thread.join(timeout=seconds + 90)
            assert not thread.is_alive(), "a client hangs"
        server.wait_until_idle()
        grown = process.memory_info().rss - before
    assert not tally.wrong, tally.wrong[:3]
    assert min(tally.counts[what] for what in ("asked", "streamed", "left", "refused")) > 0, tally.counts
    assert grown < 32 << 20, f"memory grew by {grown:,} bytes"
    health, whole = statistics.median(tally.health), statistics.median(tally.whole)
    assert health < whole / 4, "whoever asks for /health waits as those do who wait for tokens"
    print(f"{dict(tally.counts)}, memory {grown:+,} bytes, /health {health:.3f} s, answers {whole:.2f} s")
