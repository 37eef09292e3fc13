"""What layers with a memory of fixed size share: they go on from the states that sequences have in a cache's slots."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypedDict

from torch import Tensor, nn

from latentkv.errors import CacheError
from latentkv.models.batch import Batch
from latentkv.models.forms import Form
from latentkv.models.layers import Linear
from latentkv.models.rope import Rotary
from latentkv.state import LayerState, RecurrentState


class SlotUses(TypedDict):
    """Whose rows a step's are, and what it does with the slots: the indices of `ops.kda_attend` and its like."""

    q_start: Tensor
    stop: Tensor
    slot_ids: Tensor
    pending: Tensor
    committed: Tensor


class RecurrentAttention(nn.Module, ABC):
    """One layer whose memory does not grow with the text.

    Attributes:
        o_proj: of what the heads give.
    """

    o_proj: Linear

    @abstractmethod
    def forward(self, x: Tensor, positions: Rotary) -> Tensor:
        """Whole sequences without a cache, differentiable: [B, S, hidden] -> [B, S, hidden]."""

    @abstractmethod
    def recur(self, x: Tensor, positions: Rotary, memory: RecurrentState, uses: SlotUses) -> Tensor:
        """What the heads give for new tokens [T, hidden] -> [T, W]; the slots are left as they are after them."""

    def attend(
        self,
        x: Tensor,
        positions: Rotary,
        batch: Batch,
        state: LayerState,
        residual: Tensor | None = None,
        form: Form | None = None,
    ) -> Tensor:
        """Go on from the states that the sequences have in their slots, and leave the new ones there.

        Args:
            x: [T, hidden], the new tokens of all sequences, ragged.
            positions: rotary angles of the T tokens.
            batch: whose they are, and how many of each count.
            state: this layer's recurrent states.
            residual: [T, hidden] that the result is added to.
            form: of latent attention; this one has no other.

        Returns:
            [T, hidden].

        Raises:
            CacheError: the cache has no recurrent states, or the batch names no slots.
        """
        slots, pending, committed = batch.slot_ids, batch.pending, batch.committed
        if state.recurrent is None or slots is None or pending is None or committed is None:
            raise CacheError(
                "a recurrent layer needs a cache of ModelConfig.specs and a batch that was built with slots"
            )
        uses = SlotUses(q_start=batch.q_start, stop=batch.stop, slot_ids=slots, pending=pending, committed=committed)
        return self.o_proj(self.recur(x, positions, state.recurrent, uses), residual)
