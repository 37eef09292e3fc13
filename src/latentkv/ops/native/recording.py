"""Native calls recorded once and run again, without the Python that led to them.

A decode step makes the same calls on the same memory for every token, if it is written so: `Recording.record` sees to
it that nothing else is computed meanwhile, and that what is allocated lies in memory that stays.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from latentkv.errors import OpError
from latentkv.kernels import extension
from latentkv.ops.native.arena import Arena, Lease

_BRINGS_NUMBERS = {"aten::lift_fresh"}  # torch.tensor's, whose memory nothing fills again
_ALLOCATES = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}


class NotRecordableError(OpError):
    """Something was computed that is not a native call."""


class Recording:
    """The native calls of one block of code, and the memory that they use.

    Args:
        arena: where what the block allocates is to lie; other recordings may have it too, as long as nothing of one is
            read any more when another runs. None: an arena of its own.
    """

    def __init__(self, arena: Arena | None = None) -> None:
        self._calls = extension.Recording()
        self._arena = arena or Arena()

    @contextmanager
    def record(self) -> Generator[None]:
        """Run the block, and keep the native calls that it makes in this thread.

        The block may allocate tensors and take views of them, but torch may compute nothing.

        Raises:
            NotRecordableError: torch computed something.
        """
        try:
            self._calls.start()
            with _OnlyMemory(self._arena.lease()):
                yield
        finally:
            self._calls.stop()

    def run(self) -> None:
        """Make the calls again, on what now lies in the memory that they were recorded with.

        Raises:
            OpError: a call was given what it cannot take.
        """
        try:
            failed = self._calls.run()
        except ValueError as error:
            raise OpError(str(error)) from None
        if failed >= 0:
            raise OpError(f"recorded call {failed} of {len(self._calls)} names a slot or an expert that there is not")


class _OnlyMemory(TorchDispatchMode):
    """Has what is allocated lie in memory that stays, lets views pass, and refuses everything else."""

    def __init__(self, lease: Lease) -> None:
        super().__init__()
        self._lease = lease

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch's compiler is told to leave this alone; it would have to be loaded first, for seconds."""
        return False

    def __torch_dispatch__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name in _ALLOCATES:
            return self._lease.like(out)
        if func._schema.name in _BRINGS_NUMBERS or func._schema.is_mutable or not _shares_memory(out, args):
            raise NotRecordableError(f"{func._schema.name} is computed by torch")
        return out


def _shares_memory(out: Any, args: Sequence[Any]) -> bool:
    outs = out if isinstance(out, (tuple, list)) else (out,)
    if not args or not isinstance(args[0], Tensor):
        return False
    memory = args[0].untyped_storage().data_ptr()
    return all(isinstance(t, Tensor) and t.untyped_storage().data_ptr() == memory for t in outs)


def kernel_seconds() -> float:
    """Seconds that this thread has spent in native calls so far; 0 without the extension."""
    return 0.0 if extension is None else extension.kernel_seconds()
