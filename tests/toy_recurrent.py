"""A recurrent layer of plain torch, row by row: what any must do with its slots, and nothing to make it fast."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentkv.models.batch import Batch
from latentkv.models.forms import Form
from latentkv.models.rope import Rotary
from latentkv.state import LayerSpec, LayerState, RecurrentSpec

HEADS, KEY, VALUE = 2, 4, 6
CHANNELS = HEADS * (2 * KEY + VALUE)
Memory = tuple[Tensor, Tensor]  # matrices [H, Dk, Dv], what the convolution read last [3, C]


class ToyRecurrent(nn.Module):
    """A gated delta rule after a short convolution, as KDA has it."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        for name, shape in {
            "inputs": (CHANNELS, hidden_size),
            "decay": (HEADS * KEY, hidden_size),
            "beta": (HEADS, hidden_size),
            "conv": (4, CHANNELS),
            "output": (hidden_size, HEADS * VALUE),
        }.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) * (0.7 if name == "output" else 0.4)))

    def spec(self, most_drafted: int) -> LayerSpec:
        kept, waiting = ((HEADS, KEY, VALUE), (3, CHANNELS)), ((CHANNELS,), (HEADS, KEY), (HEADS,))
        return LayerSpec(None, recurrent=RecurrentSpec(kept, waiting, most_drafted))

    def forward(self, x: Tensor, positions: Rotary | None = None) -> Tensor:
        """[B, S, hidden], whole sequences."""
        return torch.stack([self.project(self.run(self.start(), *self.rows(own))[0]) for own in x])

    def attend(
        self,
        x: Tensor,
        positions: Rotary,
        batch: Batch,
        state: LayerState,
        residual: Tensor | None = None,
        form: Form | None = None,
    ) -> Tensor:
        """[T, hidden], new tokens."""
        memory = state.recurrent
        assert memory is not None and batch.slot_ids is not None
        inputs, bounds, outputs = self.rows(x), batch.q_start.tolist(), list[Tensor]()
        uses = zip(batch.slot_ids.tolist(), batch.pending.tolist(), batch.committed.tolist(), strict=True)
        for b, (slot, pending, committed) in enumerate(uses):
            first, last = bounds[b : b + 2]
            waiting = [each[slot] for each in memory.waiting]
            begins = int(batch.stop[first]) == 1
            assert not (begins and pending) and 0 < committed <= last - first
            matrices, conv = memory.kept
            now = self.start() if begins else (matrices[slot], conv[slot])
            if pending:
                _, now = self.run(now, *(each[:pending] for each in waiting))
            out, now = self.run(now, *(each[first : first + committed] for each in inputs))
            outputs.append(out)
            matrices[slot], conv[slot] = now
            drafted = [each[first + committed : last] for each in inputs]
            if len(drafted[0]):
                outputs.append(self.run(now, *drafted)[0])
                for kept, new in zip(waiting, drafted, strict=True):
                    kept[: len(new)] = new
        out = self.project(torch.cat(outputs))
        return out if residual is None else residual + out

    def start(self) -> Memory:
        return torch.zeros(HEADS, KEY, VALUE), torch.zeros(3, CHANNELS)

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the recurrence reads of [T, hidden]; row by row, so that its bits are those of each row alone."""
        decay = -functional.softplus(_rowwise(x, self.decay)).unflatten(-1, (HEADS, KEY))
        return _rowwise(x, self.inputs), decay, _rowwise(x, self.beta).sigmoid()

    def project(self, heads: Tensor) -> Tensor:
        return _rowwise(heads.flatten(1), self.output)

    def run(self, memory: Memory, inputs: Tensor, decays: Tensor, betas: Tensor) -> tuple[Tensor, Memory]:
        matrices, conv = memory
        outputs: list[Tensor] = []
        for row, decay, beta in zip(inputs, decays, betas, strict=True):
            window = torch.cat([conv, row[None]])
            mixed = functional.silu((window * self.conv).sum(0)).view(HEADS, -1)
            q, k, v = mixed.split([KEY, KEY, VALUE], dim=-1)
            k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
            matrices = matrices * decay.exp()[..., None]
            error = beta[:, None] * (v - (matrices * k[..., None]).sum(1))
            matrices = matrices + k[..., None] * error[:, None]
            outputs.append((matrices * q[..., None]).sum(1))
            conv = window[1:]
        return torch.stack(outputs), (matrices, conv)


def _rowwise(x: Tensor, weight: Tensor) -> Tensor:
    return (x[..., None, :] * weight).sum(-1)
