"""Decode steps as recorded native calls: one call from Python a step instead of a dozen a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from torch import Tensor

from latentkv.kernels import current_backend
from latentkv.models.batch import Batch
from latentkv.models.decoder import Decoder
from latentkv.models.forms import Form
from latentkv.models.rope import Rotary
from latentkv.ops.native.arena import Arena
from latentkv.ops.native.recording import NotRecordableError, Recording
from latentkv.state import PagedCache

MOST_ROWS = 256
"""Larger steps are not recorded: what Python takes is little beside what they compute."""

MOST_EACH = 8
"""Tokens of a sequence, which decodes: the next and a draft. No step of a prompt is like another."""

MOST_STEPS = 256
"""Recordings that are kept, each of a number of sequences and rows; those used last."""


class Layers(Protocol):
    """What is run: `Decoder.run_layers` or `Decoder.run_mtp`."""

    def __call__(
        self, x: Tensor, positions: Rotary, batch: Batch, cache: PagedCache, *, form: Form | None = None
    ) -> Tensor:
        """Final hidden states."""
        ...


@dataclass(frozen=True)
class _Step:
    """A recorded step, and where its inputs go and its result appears."""

    x: Tensor
    positions: Rotary
    batch: Batch
    recording: Recording
    hidden: Tensor


class Replay:
    """Runs a decoder's steps over its cache; those in which every sequence reads one token, or a few, as recorded.

    Latent attention of a recorded step is computed in its absorbed form, whatever a step would choose.

    Args:
        layers: of a packed decoder; its weights must stay where they are.
        cache: that the steps read and write.
        why_not: why steps are not to be recorded at all, as a clause.

    Attributes:
        why_not: as given, or what recording has found out; None while steps are recorded.
    """

    def __init__(self, layers: Layers, cache: PagedCache, why_not: str | None = None) -> None:
        self.layers = layers
        self.cache = cache
        self.why_not = why_not
        self._steps: dict[tuple[int, int, str], _Step] = {}  # the one that was used last comes last
        self._arena = Arena()
        self._inputs: dict[str, Tensor] = {}

    def run(
        self, batch: Batch, inputs: Callable[[Batch], tuple[Tensor, Rotary]], *, form: Form | None = None
    ) -> Tensor:
        """What the layers give for a step, [T, hidden]: as a recorded step if it can be one, else from Python.

        Args:
            batch: new tokens of some sequences.
            inputs: what the layers read of it.
            form: as `Decoder.forward` takes it.
        """
        hidden = None
        if form == "absorbed" or max(batch.query_lens) == 1:
            hidden = self.hidden(batch, inputs)
        return self.layers(*inputs(batch), batch, self.cache, form=form) if hidden is None else hidden

    def hidden(self, batch: Batch, inputs: Callable[[Batch], tuple[Tensor, Rotary]]) -> Tensor | None:
        """Final hidden states [T, hidden] of a small batch, or None where it cannot be recorded.

        Args:
            batch: new tokens of some sequences.
            inputs: what the layers read of it; called only where that is needed.
        """
        rows, backend = sum(batch.query_lens), current_backend()
        if self.why_not is not None or rows > MOST_ROWS or backend in ("torch", "triton"):
            return None
        # A first token takes the expanded form.
        if max(batch.query_lens) > MOST_EACH or min(batch.kv_lens) == 1:
            return None
        x, positions = inputs(batch)
        key = len(batch.query_lens), rows, backend
        step = self._steps.pop(key, None)
        if step is None:
            step = self._record(x, positions, batch)
            if step is None:
                return None
            if len(self._steps) >= MOST_STEPS:
                del self._steps[next(iter(self._steps))]
        else:
            self._fill(step, x, positions, batch)
            step.recording.run()
        self._steps[key] = step
        return step.hidden.clone()

    def _record(self, x: Tensor, positions: Rotary, batch: Batch) -> _Step | None:
        """Run the step for the first time; it reads the inputs from memory of its own."""
        own = replace(
            batch, **{field.name: self._own(field.name, getattr(batch, field.name)) for field in fields(batch)}
        )
        sequences, pages = len(batch.query_lens), self.cache.num_pages
        table = self._room("block_table", batch.block_table.new_empty(sequences, pages))
        own = replace(own, block_table=table, kv_lens=(pages * self.cache.page_size,) * sequences)
        table[:, : batch.block_table.shape[1]] = batch.block_table
        x = self._own("x", x)
        positions = positions._replace(cos=self._own("cos", positions.cos), sin=self._own("sin", positions.sin))
        recording = Recording(self._arena)
        try:
            with recording.record():
                hidden = self.layers(x, positions, own, self.cache, form="absorbed")
        except NotRecordableError as error:
            self.why_not = str(error)
            return None
        return _Step(x, positions, own, recording, hidden)

    def _own(self, name: str, value: Any) -> Any:
        """A copy of what is given to a step, in memory that all steps share; a value that is no tensor is itself."""
        return self._room(name, value).copy_(value) if isinstance(value, Tensor) and name != "block_table" else value

    def _room(self, name: str, value: Tensor) -> Tensor:
        """The first rows, as many as `value` has, of memory that is as large as the largest step's so far."""
        room = self._inputs.get(name)
        if room is None or len(room) < len(value):
            room = value.new_zeros(1 << (len(value) - 1).bit_length(), *value.shape[1:])
            self._inputs[name] = room
        return room[: len(value)]

    def _fill(self, step: _Step, x: Tensor, positions: Rotary, batch: Batch) -> None:
        own = step.batch
        step.x.copy_(x)
        step.positions.cos.copy_(positions.cos)
        step.positions.sin.copy_(positions.sin)
        own.q_start.copy_(batch.q_start)
        own.slots.copy_(batch.slots)
        own.stop.copy_(batch.stop)
        own.block_table[:, : batch.block_table.shape[1]] = batch.block_table
        for filled, new in (
            (own.slot_ids, batch.slot_ids),
            (own.pending, batch.pending),
            (own.committed, batch.committed),
        ):
            if filled is not None and new is not None:
                filled.copy_(new)


def why_not_recorded(decoder: Decoder) -> str | None:
    """Why no step of a decoder can be recorded, as a clause; None where it can be tried."""
    return None if decoder.model.norm.weight.is_cpu else "the model is not on the CPU"
