"""What goes from one rank to the next: the numbers of a step and hidden states, as bytes; no pickle."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise

import torch
from torch import Tensor

from latentkv.models.batch import Batch
from latentkv.models.forms import Form

HEAD_NUMBERS = 10
"""Numbers of a head, each int64: the kind, the step, how many numbers follow, and dtype and shape of the states."""

_ALIGN = 16  # int32 numbers: states begin at a multiple of 64 bytes
_MOST_DIMENSIONS = HEAD_NUMBERS - 5
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
_FORMS: tuple[Form | None, ...] = (None, "absorbed", "expanded")


class Kind(IntEnum):
    """What a message is about."""

    STEP = 0
    COPY = 1
    FAILED = 2
    STOP = 3
    LOGITS = 4


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        kind: STEP, the new tokens of a step; COPY, one slot's recurrent states into another; FAILED, a rank could not
            compute its part of a step; STOP, the end; LOGITS, of some final hidden states.
        number: of the step; of COPY that of the next one.
        numbers: int32, of STEP a batch (`batch_numbers`), of COPY the two slots, of FAILED the rank.
        x: of STEP and LOGITS hidden states, of FAILED what happened, in UTF-8.
    """

    kind: Kind
    number: int = 0
    numbers: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    x: Tensor | None = None

    def head(self) -> Tensor:
        """What is to be known before the rest can be received, [HEAD_NUMBERS] int64."""
        shape = () if self.x is None else self.x.shape
        dtype = -1 if self.x is None else _DTYPES.index(self.x.dtype)
        padding = [0] * (_MOST_DIMENSIONS - len(shape))
        return torch.tensor([self.kind, self.number, len(self.numbers), dtype, len(shape), *shape, *padding])

    def body(self) -> Tensor:
        """The rest, [N] uint8; empty where there is none."""
        numbers = torch.nn.functional.pad(self.numbers, (0, -len(self.numbers) % _ALIGN)).view(torch.uint8)
        if self.x is None:
            return numbers
        return torch.cat([numbers, self.x.contiguous().flatten().view(torch.uint8)])


def body_bytes(head: Tensor) -> int:
    """Bytes of the body that follows a head."""
    _, _, count, dtype, dimensions, *shape = head.tolist()
    numbers = 4 * (count + -count % _ALIGN)
    return numbers if dtype < 0 else numbers + torch.Size(shape[:dimensions]).numel() * _DTYPES[dtype].itemsize


def message_of(head: Tensor, body: Tensor) -> Message:
    """The message of a head and the body that came after it, whose memory it keeps."""
    kind, number, count, dtype, dimensions, *shape = head.tolist()
    end = 4 * (count + -count % _ALIGN)
    x = None if dtype < 0 else body[end:].view(_DTYPES[dtype]).view(shape[:dimensions])
    return Message(Kind(kind), number, body[:end].view(torch.int32)[:count], x)


def batch_numbers(batch: Batch, form: Form | None) -> Tensor:
    """A batch and the form of its latent attention as int32 numbers; token ids are left out, which no layer reads."""
    extras = (batch.start, batch.slot_ids, batch.pending, batch.committed)
    head = [
        len(batch.positions),
        len(batch.query_lens),
        batch.block_table.shape[1],
        batch.kv_start,
        _FORMS.index(form),
        *(extra is not None for extra in extras),
        *batch.query_lens,
        *batch.kv_lens,
    ]
    tensors = [batch.positions, batch.q_start, batch.block_table, batch.slots, batch.stop]
    tensors += [extra for extra in extras if extra is not None]
    return torch.cat([torch.tensor(head, dtype=torch.int32), *(each.flatten().to(torch.int32) for each in tensors)])


def batch_of(numbers: Tensor) -> tuple[Batch, Form | None]:
    """What `batch_numbers` was given, without token ids."""
    rows, sequences, width, kv_start, form, *has = numbers[:9].tolist()
    lens = numbers[9 : 9 + 2 * sequences].tolist()
    sizes = [
        rows,
        sequences + 1,
        sequences * width,
        rows,
        rows,
        rows * has[0],
        *(sequences * each for each in has[1:]),
    ]
    ends = [9 + 2 * sequences]
    for size in sizes:
        ends.append(ends[-1] + size)
    parts = [numbers[begin:end] for begin, end in pairwise(ends)]
    positions, q_start, table, slots, stop, start, *extras = parts
    slot_ids, pending, committed = (part if there else None for part, there in zip(extras, has[1:], strict=True))
    batch = Batch(
        input_ids=positions.new_empty(0, dtype=torch.int64),
        positions=positions.to(torch.int64),
        q_start=q_start,
        block_table=table.view(sequences, width),
        slots=slots.to(torch.int64),
        stop=stop,
        query_lens=tuple(lens[:sequences]),
        kv_lens=tuple(lens[sequences:]),
        kv_start=kv_start,
        start=start if has[0] else None,
        slot_ids=slot_ids,
        pending=pending,
        committed=committed,
    )
    return batch, _FORMS[form]
