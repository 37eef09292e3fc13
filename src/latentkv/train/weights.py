"""Float32 weights that the optimiser updates, beside the model's own, which may compute in bf16."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

RESIDUAL_SUFFIXES = ("o_proj.weight", "down_proj.weight", "down_proj")


class MasterWeights:
    """The trained weights by name. In float32 they are the model's parameters; in bf16, float32 copies of them.

    The model's bf16 gradients are added up in float32, so accumulation over micro-batches loses nothing.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Turn `model`'s parameters (float32 until now) into `dtype`, keeping float32 masters."""
        self._parameters = dict(model.named_parameters())
        self._copied = dtype != torch.float32
        self.by_name: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            if self._copied:
                self.by_name[name] = (
                    parameter.detach().to(torch.float32, copy=True).requires_grad_(parameter.requires_grad)
                )
                parameter.data = parameter.data.to(dtype)
            else:
                self.by_name[name] = parameter

    def collect_gradients(self) -> None:
        """After a backward pass: add the model's gradients to the masters'."""
        if not self._copied:
            return
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            master = self.by_name[name]
            if master.grad is None:
                master.grad = parameter.grad.to(torch.float32)
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    def clip_gradients(self, limit: float) -> Tensor:
        """Scale the gradients down to the norm `limit` (0: leave them); their norm before."""
        gradients = [w.grad for w in self.by_name.values() if w.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if limit > 0:
            torch.nn.utils.clip_grads_with_norm_(list(self.by_name.values()), limit, norm)
        return norm

    def drop_gradients(self) -> None:
        """Forget the step's gradients."""
        for weight in self.by_name.values():
            weight.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """After an optimiser step: round the masters into the model's parameters."""
        if self._copied:
            for name, parameter in self._parameters.items():
                parameter.copy_(self.by_name[name])

    def withdraw(self) -> None:
        """After training: let the model have the masters themselves."""
        for name, parameter in self._parameters.items():
            parameter.data = self.by_name[name].data


@torch.no_grad()
def initialize(model: nn.Module, std: float, num_layers: int, seed: int) -> None:
    """Fresh weights: matrices normal(0, std), those that write to the residual stream / sqrt(2 layers), norms 1.

    Args:
        model: its parameters are overwritten; correction biases (buffers) are set to 0.
        std: the config's `initializer_range`.
        num_layers: decoder layers that add to the residual stream.
        seed: same seed, same weights.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            scale = std / math.sqrt(2 * num_layers) if name.endswith(RESIDUAL_SUFFIXES) else std
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()
