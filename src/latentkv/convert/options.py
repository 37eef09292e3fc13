"""What a person may choose of a conversion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from latentkv.errors import ConfigError
from latentkv.option_types import Flag
from latentkv.ranges import require_ranges
from latentkv.sizes import parse_share

Method = Literal["weighted", "transmla", "svd"]
Export = Literal["transformers", "vllm"]
Refit = Literal["all", "attention", "none"]


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert.

    Attributes:
        rank: width of the latent; None is what `kv_budget` and `rope_dim` leave.
        rope_dim: dimensions of the shared key with RoPE; None is the best that `kv_budget` allows, by predicted losses.
        kv_budget: share of the source's cached numbers to keep, like 1/4, instead of `rank`.
        method: weighted; transmla and svd are there to be compared with.
        fold: frequencies that share a basis, with transmla.
        export: the engine, besides LatentKV, that the checkpoint is for: transformers or vllm.
        refit: projections that are fitted to the source's residual stream after factoring: attention (its output's),
            all (the dense feed-forward's, too) or none; None is all with weighted, none with the other methods.
    """

    rank: int | None = None
    rope_dim: int | None = None
    kv_budget: Annotated[float | None, Flag(read=parse_share)] = None
    method: Method = "weighted"
    fold: int = 1
    export: Export = "transformers"
    refit: Refit | None = None

    def __post_init__(self) -> None:
        """Refuse what no source allows."""
        require_ranges(self, ConfigError)
        for name, known in (("method", get_args(Method)), ("export", get_args(Export)), ("refit", get_args(Refit))):
            if (asked := getattr(self, name)) is not None and asked not in known:
                raise ConfigError(f"--{name}={asked} is not known: choose {', '.join(known)}.")
        if (self.rank is None) == (self.kv_budget is None):
            raise ConfigError("Give either --rank or --kv-budget.")
        if self.rank is not None and self.rope_dim is None:
            raise ConfigError("--rank needs --rope-dim; or give --kv-budget instead of both.")
        if self.rope_dim is not None and self.rope_dim % 2:
            raise ConfigError(f"--rope-dim={self.rope_dim} is not allowed: an even number, 2 or more.")
        if self.method != "weighted" and self.rope_dim is None:
            raise ConfigError(f"method={self.method} needs a rope_dim: only weighted chooses one.")

    @property
    def refits(self) -> Refit:
        """`refit`, decided."""
        return self.refit or ("all" if self.method == "weighted" else "none")
