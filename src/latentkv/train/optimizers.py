"""Which weight goes to which optimiser, and their state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from latentkv.train.muon import Muon
from latentkv.train.options import TrainOptions
from latentkv.train.ranks import own_rows

# Matrices that Muon is not meant for: their rows are looked up or scored one by one, or are no matrix's.
LOOKUP_SUFFIXES = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "conv_taps", "A_log")
FUSED_PAIR_SUFFIX = "gate_up_proj"


def build_optimizers(weights: Mapping[str, Tensor], options: TrainOptions) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the hidden matrices and AdamW for the rest; weight decay on matrices only."""
    hidden = {n: w for n, w in weights.items() if w.ndim >= 2 and not n.endswith(LOOKUP_SUFFIXES)}
    by_muon = hidden if options.optimizer == "muon" else {}
    rest = {n: w for n, w in weights.items() if n not in by_muon}
    groups = [
        {"params": [w for w in rest.values() if w.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [w for w in rest.values() if w.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], lr=options.lr, betas=options.betas, fused=True)
    ]
    if by_muon:
        pairs = [w for n, w in by_muon.items() if n.endswith(FUSED_PAIR_SUFFIX)]
        single = [w for n, w in by_muon.items() if not n.endswith(FUSED_PAIR_SUFFIX)]
        muon_groups = [{"params": single, "matrices": 1}, {"params": pairs, "matrices": 2}]
        optimizers.append(
            Muon(
                [g for g in muon_groups if g["params"]],
                lr=options.lr,
                momentum=options.momentum,
                weight_decay=options.weight_decay,
            )
        )
    return optimizers


def optimizer_tensors(weights: Mapping[str, Tensor], optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimisers' state as `<weight's name>:<state's name>` -> tensor, for safetensors."""
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for optimizer in optimizers:
            for key, value in optimizer.state.get(weight, {}).items():
                tensors[f"{name}:{key}"] = value
    return tensors


def restore_optimizers(
    weights: Mapping[str, Tensor], optimizers: list[torch.optim.Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises:
        ValueError: a state is of another weight, or of another shape than its weight.
    """
    for key, value in tensors.items():
        name, _, state_name = key.rpartition(":")
        weight = weights.get(name)
        if weight is None or value.shape not in (weight.shape, torch.Size()):
            raise ValueError(f"the optimiser's tensor {key} belongs to another run")
        for optimizer in optimizers:
            if any(weight is owned for group in optimizer.param_groups for owned in group["params"]):
                optimizer.state[weight][state_name] = _laid_out_as(weight, value)


def _laid_out_as(weight: Tensor, value: Tensor) -> Tensor:
    """A copy of what belongs to a weight; of one whose rows several processes have, this one's rows."""
    if value.shape != weight.shape:
        return value.clone()
    copied = torch.zeros_like(weight, requires_grad=False)
    rows, first = own_rows(copied)
    rows.copy_(value[first : first + len(rows)] if value.ndim else value)
    return copied
