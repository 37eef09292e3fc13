"""Decode steps as recorded native calls: one call from Python a step instead of a dozen a layer."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from torch import Tensor

from latentkv.cache import LatentCache
from latentkv.models.batch import Batch
from latentkv.models.decoder import Decoder
from latentkv.models.rope import Rotary
from latentkv.ops.native.core import current_isa
from latentkv.ops.native.recording import NotRecordableError, Recording

MOST_SEQUENCES = 8
"""Larger steps are not recorded: each recording keeps its intermediates, some 70 kB a sequence and layer of V2-Lite."""


@dataclass(frozen=True)
class _Step:
    """A recorded step, and where its inputs go and its result appears."""

    x: Tensor
    positions: Rotary
    batch: Batch
    recording: Recording
    hidden: Tensor


class Replay:
    """Runs steps in which every sequence reads one token.

    Args:
        decoder: packed, on the CPU; its weights must stay where they are.
        cache: that the steps read and write.

    Attributes:
        why_not: why steps of this model are not recorded, as a clause; None while they are.
    """

    def __init__(self, decoder: Decoder, cache: LatentCache) -> None:
        self.decoder = decoder
        self.cache = cache
        self.why_not: str | None = None if decoder.model.norm.weight.is_cpu else "the model is not on the CPU"
        self._steps: dict[tuple[int, str], _Step] = {}

    def hidden(self, batch: Batch) -> Tensor | None:
        """Final hidden states [B, hidden] of a batch of one token each, or None where it cannot be recorded."""
        if self.why_not is not None or len(batch.query_lens) > MOST_SEQUENCES or max(batch.query_lens) > 1:
            return None
        if current_isa() == "torch" or min(batch.kv_lens) == 1:  # a first token takes the expanded form
            return None
        x, positions = self.decoder.inputs(batch)
        key = len(batch.query_lens), current_isa()
        step = self._steps.get(key)
        if step is None:
            step = self._record(x, positions, batch)
            if step is None:
                return None
            self._steps[key] = step
        else:
            self._fill(step, x, positions, batch)
            step.recording.run()
        return step.hidden.clone()

    def _record(self, x: Tensor, positions: Rotary, batch: Batch) -> _Step | None:
        """Run the step for the first time; it reads the inputs from memory of its own."""
        own = replace(batch, **{field.name: _copy(getattr(batch, field.name)) for field in fields(batch)})
        table = batch.block_table.new_zeros(len(batch.query_lens), self.cache.num_pages)
        own = replace(own, block_table=table)
        table[:, : batch.block_table.shape[1]] = batch.block_table
        x, positions = x.clone(), positions._replace(cos=positions.cos.clone(), sin=positions.sin.clone())
        recording = Recording()
        try:
            with recording.record():
                hidden = self.decoder.run_layers(x, positions, own, self.cache, form="absorbed")
        except NotRecordableError as error:
            self.why_not = str(error)
            return None
        return _Step(x, positions, own, recording, hidden)

    def _fill(self, step: _Step, x: Tensor, positions: Rotary, batch: Batch) -> None:
        own = step.batch
        step.x.copy_(x)
        step.positions.cos.copy_(positions.cos)
        step.positions.sin.copy_(positions.sin)
        own.slots.copy_(batch.slots)
        own.stop.copy_(batch.stop)
        own.block_table[:, : batch.block_table.shape[1]] = batch.block_table


def _copy(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value
