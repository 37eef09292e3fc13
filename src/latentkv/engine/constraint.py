"""What the engine needs of a compiled `Structure`: which tokens may come next. It knows no strings."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class ConstraintState(Protocol):
    """Where one completion stands."""

    @property
    def allowed(self) -> NDArray[np.bool_]:
        """[V] tokens that may come next, one or more while the completion goes on; no end token is among them."""
        ...

    @property
    def may_end(self) -> bool:
        """Whether the tokens so far are a whole text."""
        ...

    def accept(self, token_id: int) -> bool:
        """Take an allowed token; False when no token may follow it."""
        ...


class Constraint(Protocol):
    """A form of text, for any number of completions at once."""

    def start(self) -> ConstraintState:
        """The state of a completion without tokens; at least one token is allowed."""
        ...


def blocked_tokens(state: ConstraintState, end_ids: Collection[int], device: torch.device) -> Tensor:
    """[V] bool: tokens that may not come next; `end_ids` may where the text may end."""
    blocked = ~torch.from_numpy(state.allowed)
    if state.may_end:
        # A checkpoint may name end tokens that its vocabulary does not have.
        blocked[[token for token in end_ids if token < len(blocked)]] = False
    return blocked.to(device)
