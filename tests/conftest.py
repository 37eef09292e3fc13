"""Settings of every test."""

from __future__ import annotations

import os

# One thread, in the programs that tests start, too: small products do not wait for each other, results do not vary, and
# the processes that run tests side by side leave each other a core. OpenMP reads it once, when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Teams that tests do ask for sleep while they wait: where processes share cores, spinning keeps back whom it awaits.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Nothing goes into the folder of packed weights in the user's home; tests of it name their own.
os.environ["LATENTKV_PACKED_DIR"] = ""

import atexit
import gc
import logging
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from thinning import covering

if TYPE_CHECKING:
    from latentkv import LLM
    from live_server import Live

# The same examples every time, however long they take: a run that fails can be run again.
hypothesis.settings.register_profile("latentkv", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("latentkv")

# A shell that runs the tests in the background has them ignore Ctrl-C, and so would the programs that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Settings of torch, which takes seconds to import: not in a process that only hands tests to others."""
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput") and not config.option.collectonly:
        return
    import torch

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        # Triton's kernels are tested through its interpreter, which has to be chosen before triton is imported.
        os.environ["TRITON_INTERPRET"] = "1"
        # torch.manual_seed would keep its caller's stack for every kind of device, at every call, in case one is found
        # later: that takes longer than most tests here, and memory that is never given back.
        torch.manual_seed = torch.default_generator.manual_seed
    # torch keeps what its loggers say from the root's handlers, so pytest would add its own to each of some forty, and
    # take them away again, three times a test.
    for logger in [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith("torch")]:
        logger.propagate = True


def pytest_xdist_auto_num_workers() -> int | None:
    """One process more than cores: while one waits for a browser or for a program that it started, the others work."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # which pytest-xdist reads itself
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + 1


SHARED = {
    **dict.fromkeys(("live", "reference", "client", "with_tools", "with_thinking"), "server"),
    "browser": "browser",
}
"""Fixtures that take long to make, and the group of tests that share one."""

MODULES = {
    "forks": {"run_forked", "ForkedProgram", "server_process"},
    "families": {"save_checkpoint", "FIRST_CASES"},
}
"""What modules have that start programs as copies of one process, which takes seconds to start itself, or that read
checkpoints of every family, which are written once; and the group of their tests."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays until the end: to look through it for garbage takes seconds each time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()
        atexit.register(gc.unfreeze)  # Triton's library looks at the end whether all is given back


NOT_USUAL = {"slow", "gpu", "rank", "clients", "mutation"}


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks, and pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run side by side, those of a file stay together, and those that share what takes long to make do.

    The browser's and those that start programs, which wait the longest, come first: at the end, nothing would be left
    to do meanwhile.
    """
    _thin_out(items)
    groups: dict[pytest.Item, str] = {}
    for item in items:
        used = [SHARED[name] for name in getattr(item, "fixturenames", ()) if name in SHARED]
        held = vars(getattr(item, "module", None) or object).keys()
        used += [group for group, names in MODULES.items() if not names.isdisjoint(held)]
        groups[item] = used[0] if used else item.path.name
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(groups[item]))
    items.sort(key=lambda item: groups[item] not in ("browser", *MODULES))


def _thin_out(items: list[pytest.Item]) -> None:
    """Mark as slow what tests marked `thin` can spare."""
    of_test: dict[tuple[str, int], list[Any]] = {}
    for item in items:
        mark = item.get_closest_marker("thin")
        if mark is not None and not any(item.get_closest_marker(name) for name in NOT_USUAL):
            key = item.nodeid.partition("[")[0], mark.kwargs["meet"]
            of_test.setdefault(key, []).append(item)
    for (_, meet), same in of_test.items():
        cases = [{name: repr(value) for name, value in item.callspec.params.items()} for item in same]
        for item, taken in zip(same, covering(cases, meet), strict=True):
            if not taken:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def unpainted() -> Iterator[None]:
    """Figures are put together, but not painted, which takes half a second each; the tests of pictures paint theirs."""
    from matplotlib.figure import Figure

    def savefig(self: Figure, file: Any, **how: Any) -> None:
        assert self.axes
        file.write(b"a picture") if hasattr(file, "write") else Path(file).write_bytes(b"a picture")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random numbers are the same in every run, whatever ran before."""
    import torch

    torch.manual_seed(0)


# The server's tests and those of its faults; imported here when they ask, for all others need no server.


@pytest.fixture(scope="session")
def reference() -> LLM:
    """The served model once more, to ask directly."""
    from latentkv import LLM

    return LLM(dtype="fp32", kv_cache_bytes=16 << 20)


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """A server with the embedded model, for all tests that leave it as it was."""
    from latentkv import LLM
    from live_server import serving

    with serving(LLM(dtype="fp32", kv_cache_bytes=16 << 20, step_seconds=0.25)) as server:
        yield server
