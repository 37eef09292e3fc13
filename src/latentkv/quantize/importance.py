"""What the error of each column of a weight counts: the mean square of what it is multiplied by in a real text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentkv import ops
from latentkv.checkpoint.names import published_name
from latentkv.errors import TokenizerError
from latentkv.llm_options import tokenizer_of
from latentkv.models.layers import Linear
from latentkv.models.loading import load_model
from latentkv.models.moe import Experts

Importance = Mapping[str, Tensor]
"""What the squared error of each column of a weight counts, float32 [D] of mean 1, by the weight's published name."""

WINDOW = 512
"""Tokens that are read at a time."""

# Part of the mean that every column counts at least: a text shows which columns matter, not that one never will.
_FLOOR = 0.01


def column_importance(folder: Path, text: str) -> Importance:
    """Run a model over a text and take the mean squares of what its matrices are given.

    Experts are given what is routed to them; those that get nothing are left out.

    Args:
        folder: of the model, which is held in memory unquantised.
        text: like what the model will be used for; `WINDOW` tokens of it are read at a time, each time anew.

    Returns:
        By published names, of the linear layers, each expert, and an output head that is not the embedding.

    Raises:
        CheckpointError, ConfigError: as `load_model`.
        TokenizerError: the model has no tokenizer, or one of another model.
    """
    decoder = load_model(folder)
    tokenizer = tokenizer_of(folder, decoder.config)
    if tokenizer is None:
        raise TokenizerError(f"{folder} has no tokenizer, which calibrating on a text needs: put its files there")
    ids, first = tokenizer.encode(text, add_bos=False), [tokenizer.bos_id] if tokenizer.adds_bos else []
    step = max(1, min(WINDOW, decoder.config.max_positions) - len(first))
    squares = _Squares()
    with torch.inference_mode():
        handles = [handle for name, module in decoder.named_modules() for handle in squares.watch(name, module)]
        for start in range(0, len(ids), step):
            hidden = decoder.forward_train(torch.tensor([first + ids[start : start + step]]))
            if not decoder.config.tie_word_embeddings:
                squares.add("lm_head.weight", hidden[0])
        for handle in handles:
            handle.remove()
    return squares.means()


class _Squares:
    """Sums of squares by column, and of how many rows."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}

    def add(self, name: str, rows: Tensor) -> None:
        """[T, D] that the weight of this name is given."""
        if len(rows):
            total = rows.float().square().sum(0, dtype=torch.float64)
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._rows[name] = self._rows.get(name, 0) + len(rows)

    def watch(self, name: str, module: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Take what a module is given from now on."""
        if name.startswith("mtp."):
            return []
        if isinstance(module, Linear):
            return [
                module.register_forward_pre_hook(lambda _, given: self.add(f"{name}.weight", given[0].flatten(0, -2)))
            ]
        if isinstance(module, Experts):
            known_as = published_name(name, num_layers=0)  # no number of a layer in it changes
            return [module.register_forward_pre_hook(lambda _, given: self._add_experts(known_as, module, *given[:2]))]
        return []

    def _add_experts(self, name: str, experts: Experts, x: Tensor, expert_ids: Tensor) -> None:
        for expert in expert_ids[expert_ids < len(experts.gate_up_proj)].unique().tolist():
            rows = x[(expert_ids == expert).any(-1)]
            given = ops.silu_mul(functional.linear(rows, experts.gate_up_proj[expert]), experts.limit)
            for leaf in ("gate_proj", "up_proj"):
                self.add(f"{name}.{expert}.{leaf}.weight", rows)
            self.add(f"{name}.{expert}.down_proj.weight", given)

    def means(self) -> dict[str, Tensor]:
        """Mean squares, made to have the mean 1."""
        found: dict[str, Tensor] = {}
        for name, total in self._sums.items():
            squares = total / self._rows[name]
            mean = squares.mean()
            if bool(torch.isfinite(mean)) and mean > 0:
                found[name] = (squares / mean * (1 - _FLOOR) + _FLOOR).float()
        return found
