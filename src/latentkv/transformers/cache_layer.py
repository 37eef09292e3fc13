"""`LatentLayer`: a layer of transformers' `DynamicCache` whose tokens lie as rows `[c ; k_rope]` in pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer

from latentkv.ops.kv_formats import ROW_ALIGNMENT
from latentkv.state.spec import PAGE_SIZE

GROWTH = 1.5
"""What room grows by where it is full."""


class _Rows(DynamicLayer):
    """Latents and rotated shared keys of one MLA layer, side by side, with room for more.

    transformers' layer copies everything whenever a token is added; this one writes the token. `keys` [B, 1, T, L] and
    `values` [B, 1, T, R] are views of the rows, so what the base class does with them (cropping, beams) works as there.
    """

    _rows: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add new tokens.

        Args:
            key_states: [B, 1, S, L], their latents.
            value_states: [B, 1, S, R], their rotated shared keys.
            args: of other kinds of layer.
            kwargs: likewise.

        Returns:
            Latents [B, 1, T, L] and shared keys [B, 1, T, R] of all tokens: views of rows, see `rows_of`.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states)  # nothing that a gradient needs may be written to
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        batch, _, new, latent_dim = key_states.shape
        width, total = latent_dim + value_states.shape[-1], past + new
        rows = self._rows
        # Beams, and whoever selects sequences, leave copies in `keys` and `values`.
        keys, values = self.keys, self.values
        lies_here = rows is not None and keys is not None and keys.data_ptr() == rows.data_ptr()
        if rows is None or rows.shape[:1] != (batch,) or rows.shape[1] < total or (past and not lies_here):
            rows = empty_rows(key_states, total if not past else int(total * GROWTH), width)
            if past and keys is not None and values is not None:
                rows[:, :past, :latent_dim] = keys[:, 0]
                rows[:, :past, latent_dim:width] = values[:, 0]
            self._rows = rows
        rows[:, past:total, :latent_dim] = key_states[:, 0]
        rows[:, past:total, latent_dim:width] = value_states[:, 0]
        self.keys = rows[:, None, :total, :latent_dim]
        self.values = rows[:, None, :total, latent_dim:width]
        return self.keys, self.values

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._rows = None


class LatentLayer(_Rows):
    """A layer of latents; see `_Rows`."""


class LatentIndexedLayer(_Rows, DynamicIndexedLayer):
    """Likewise, beside the keys by which an indexer selects tokens."""


LATENT_LAYERS: dict[type[object], type[_Rows]] = {
    DynamicLayer: LatentLayer,
    DynamicIndexedLayer: LatentIndexedLayer,
}
"""What takes the place of a layer of transformers' that grows."""


def empty_rows(like: Tensor, tokens: int, width: int) -> Tensor:
    """Room [B, whole pages, row] for `tokens` tokens a sequence, of `width` numbers and their padding; zeroed."""
    align = ROW_ALIGNMENT // like.element_size()
    return like.new_zeros(like.shape[0], -(-tokens // PAGE_SIZE) * PAGE_SIZE, -(-width // align) * align)


def rows_of(latents: Tensor, k_rope: Tensor) -> Tensor:
    """The rows [B, whole pages, row] that a `LatentLayer` gave these views of, or a copy if another cache did.

    Args:
        latents: [B, 1, T, L].
        k_rope: [B, 1, T, R].
    """
    batch, _, tokens, latent_dim = latents.shape
    row, room = latents.stride(2), latents.stride(0)
    beside = latents.data_ptr() + latent_dim * latents.element_size() == k_rope.data_ptr()
    alike = latents.stride()[::2] == k_rope.stride()[::2] and latents.stride(3) == k_rope.stride(3) == 1
    is_paged = (
        row * latents.element_size() % ROW_ALIGNMENT == 0 and room % (row * PAGE_SIZE) == 0 and room >= tokens * row
    )
    if beside and alike and is_paged:
        return latents.as_strided((batch, room // row, row), (room, row, 1))
    rows = empty_rows(latents, tokens, latent_dim + k_rope.shape[-1])
    rows[:, :tokens, :latent_dim] = latents[:, 0]
    rows[:, :tokens, latent_dim : latent_dim + k_rope.shape[-1]] = k_rope[:, 0]
    return rows
