"""The ranks of a model as processes of their own, each a copy of one that has imported what it needs."""

from __future__ import annotations

import json
import socket
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forked_program import ForkedProgram
from latentkv import SamplingParams

BEGIN = """
import json, os, sys
rank, size, port, task = sys.argv[1:5]
task = json.loads(task)
os.environ.update(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=size)
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, LATENTKV_LOOPBACK_STORE="1")
"""

GENERATE = (
    BEGIN
    + """
from latentkv import LLM, SamplingParams
from latentkv.engine.pace import Pace
from latentkv.models.replay import Replay

def held(decoder):
    from latentkv.models.packing import packed_weights
    return sum(p.nbytes for p in decoder.parameters()) + sum(w.nbytes for w in packed_weights(decoder))

def common_memory():
    # Bytes of the cache in common that this process has touched, and a fair share of them.
    import re
    from pathlib import Path
    found = re.search(r"latentkv-cache.*?Rss: *(\\d+) kB.*?Pss: *(\\d+) kB", Path("/proc/self/smaps").read_text(), re.S)
    return [1024 * int(kib) for kib in found.groups()] if found else None

replays, made = [], Replay.__init__
def noted(self, *arguments):
    made(self, *arguments)
    replays.append(self)
Replay.__init__ = noted

from latentkv.parallel.ring import Ring
kept, send = [0], Ring.send
def counted(self, message):
    send(self, message)
    kept[0] = max(kept[0], len(self._outgoing._under_way))
Ring.send = counted

stages = int(size) // task["options"].get("tensor_parallel", 1)
try:
    llm = LLM(task["folder"], pipeline_parallel=stages, **task["options"])
except SystemExit:
    print(json.dumps({"recorded": [len(replay._steps) for replay in replays], "kept": kept[0]}))
    raise
if task["chunk"]:
    llm.engine._pace = Pace(task["chunk"], None)
tokens = []
for requests in task["turns"]:
    params = [SamplingParams(**params) for _, params in requests]
    tokens += [each.token_ids for each in llm.generate([prompt for prompt, _ in requests], params)]
llm.cache.check()
assert llm.cache.pool.free_pages == llm.cache.num_pages
from dataclasses import asdict
done = json.dumps({
    "tokens": tokens,
    "logits": llm.logits(task["scored"]).double().tolist() if task["scored"] else None,
    "recorded": [len(replay._steps) for replay in replays],
    "counters": asdict(llm.engine.counters),
    "kept": kept[0],
    "cache_bytes": llm.cache.allocated_bytes,
    "common_memory": common_memory(),
    "stage": [llm.decoder.stage.first, llm.decoder.stage.last],
    "weight_bytes": held(llm.decoder),
})
llm.close()
print(done)
"""
)

Turn = Sequence[tuple[list[int], SamplingParams]]
"""Requests that run together: prompts, and how they are completed."""


@dataclass
class Task:
    """What the driver is to do: requests together, and those of the next turn after them; then a text to score."""

    folder: Path
    turns: Sequence[Turn]
    options: dict[str, Any]
    chunk: int = 0
    scored: Sequence[int] = ()

    def as_json(self) -> str:
        turns = [[(prompt, _given(params)) for prompt, params in turn] for turn in self.turns]
        return json.dumps(asdict(self) | {"folder": str(self.folder), "turns": turns})


def _given(params: SamplingParams) -> dict[str, Any]:
    default = asdict(SamplingParams())
    return {name: value for name, value in asdict(params).items() if value != default[name]}


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@contextmanager
def ranks_of(code: str, size: int, task: str, *arguments: object) -> Generator[list[ForkedProgram]]:
    """Ranks that run `code`; those that still run in the end are killed."""
    port = free_port()
    ranks = [ForkedProgram(code, rank, size, port, task, *arguments) for rank in range(size)]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.__exit__()


def generate(size: int, task: Task, begin: str = "") -> list[dict[str, Any]]:
    """What every rank has to say once a task is done, the driver's first; all have ended well.

    Args:
        size: how many.
        task: for the driver.
        begin: what each of them runs first.
    """
    with ranks_of(begin + GENERATE, size, task.as_json()) as ranks:
        for rank in ranks:
            rank.stdin.close()
        written = [(rank.stdout.read(), rank.stderr.read()) for rank in ranks]
        codes = [rank.wait(60) for rank in ranks]
    assert codes == [0] * size, "\n".join(err for _, err in written)
    return [json.loads(out) for out, _ in written]
