"""What a person may choose of a conversion."""

from __future__ import annotations

from dataclasses import dataclass

from latentkv.convert.allocation import grid_steps, largest_grid
from latentkv.convert.export import Export
from latentkv.convert.layer import Method
from latentkv.convert.source import SourceModel
from latentkv.errors import ConfigError
from latentkv.ranges import require_ranges


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert.

    Attributes:
        rank: r; None: the one of `rope_dim` that the budget leaves.
        rope_dim: R; None: the best that the budget allows, by the predicted losses.
        kv_budget: numbers a token and layer that are cached, as a share of the source's; instead of rank.
        method: see `LayerPlan`; all but "weighted" are there to be compared with.
        fold: of "transmla".
        export: the engine, besides LatentKV, that the checkpoint is for.
    """

    rank: int | None = None
    rope_dim: int | None = None
    kv_budget: float | None = None
    method: Method = "weighted"
    fold: int = 1
    export: Export = "transformers"

    def __post_init__(self) -> None:
        """Refuse what no source allows."""
        require_ranges(self, ConfigError)
        if (self.rank is None) == (self.kv_budget is None):
            raise ConfigError("Give either --rank or --kv-budget.")
        if self.rank is not None and self.rope_dim is None:
            raise ConfigError("--rank needs --rope-dim; or give --kv-budget instead of both.")
        if self.rope_dim is not None and self.rope_dim % 2:
            raise ConfigError(f"--rope-dim={self.rope_dim} is not allowed: an even number, 2 or more.")
        if self.method != "weighted" and self.rope_dim is None:
            raise ConfigError(f"method={self.method} needs a rope_dim: only weighted chooses one.")

    def require_fit(self, source: SourceModel) -> None:
        """Raise `ConfigError` for sizes that this source does not allow."""
        width, head = source.shape.kv_width, source.shape.head_dim
        if self.rank is not None and not 1 <= self.rank <= 2 * width:
            raise ConfigError(f"--rank={self.rank} is not allowed: this model's keys and values take 1 to {2 * width}.")
        if self.rope_dim is not None and not (2 <= self.rope_dim <= width and self.rope_dim % 2 == 0):
            raise ConfigError(f"--rope-dim={self.rope_dim} is not allowed: an even number from 2 to {width}.")
        if self.rank is not None and self.rope_dim is not None and self.rank + self.rope_dim > 2 * width:
            raise ConfigError(
                f"--rank={self.rank} is not allowed with --rope-dim={self.rope_dim}, which leaves at most "
                f"{2 * width - self.rope_dim} of this model's keys and values."
            )
        if (head // 2) % self.fold:
            raise ConfigError(f"fold={self.fold} is not allowed: it must divide {head // 2} frequencies.")
        if self.export == "vllm":
            self._require_vllm(source)

    def _require_vllm(self, source: SourceModel) -> None:
        """Raise `ConfigError` for what vLLM's DeepSeek-V3 cannot say."""
        instead = "give --export transformers."
        if source.attention.qkv_bias or source.attention.output_bias:
            raise ConfigError(f"--export vllm cannot carry the biases of this model's attention: {instead}")
        if self.method != "weighted":
            raise ConfigError(
                f"--export vllm chooses the frequencies by itself, not by method={self.method}: {instead}"
            )
        most = 2 * largest_grid(source.frequencies)
        if not most:
            kind = source.config.rope.kind
            raise ConfigError(f"--export vllm cannot say the frequencies of this model's RoPE ({kind}): {instead}")
        if self.rope_dim is not None and not grid_steps(source.frequencies, self.rope_dim // 2):
            raise ConfigError(
                f"--rope-dim={self.rope_dim} is not allowed with --export vllm, which takes frequencies of this model "
                f"that form a plain RoPE: give at most {most}, or {instead.removeprefix('give ')}"
            )

    def sizes(self, source: SourceModel) -> list[tuple[int, int]]:
        """The (rank, rope_dim) that come into question."""
        width, head = source.shape.kv_width, source.shape.head_dim
        if self.rank is not None and self.rope_dim is not None:
            return [(self.rank, self.rope_dim)]
        total = int((self.kv_budget or 1) * 2 * width)
        step = max(2, head // 8 // 2 * 2)
        dims = [self.rope_dim] if self.rope_dim else range(step, min(2 * head, width, total - 1) + 1, step)
        if self.export == "vllm":
            dims = [dim for dim in dims if grid_steps(source.frequencies, dim // 2)]
        found = [(min(total - dim, 2 * width - dim), dim) for dim in dims if total - dim >= 1]
        if not found:
            raise ConfigError(f"--kv-budget={self.kv_budget:g} leaves {total} numbers a token: too few for this model.")
        return found
