"""Which sizes of a conversion a source allows."""

from __future__ import annotations

from latentkv.convert.allocation import grid_steps, largest_grid
from latentkv.convert.options import ConvertOptions
from latentkv.convert.source import SourceModel
from latentkv.errors import ConfigError


def require_fit(options: ConvertOptions, source: SourceModel) -> None:
    """Raise `ConfigError` for sizes that this source does not allow."""
    width, head = source.shape.kv_width, source.shape.head_dim
    if options.rank is not None and not 1 <= options.rank <= 2 * width:
        raise ConfigError(f"--rank={options.rank} is not allowed: this model's keys and values take 1 to {2 * width}.")
    if options.rope_dim is not None and not (2 <= options.rope_dim <= width and options.rope_dim % 2 == 0):
        raise ConfigError(f"--rope-dim={options.rope_dim} is not allowed: an even number from 2 to {width}.")
    if options.rank is not None and options.rope_dim is not None and options.rank + options.rope_dim > 2 * width:
        raise ConfigError(
            f"--rank={options.rank} is not allowed with --rope-dim={options.rope_dim}, which leaves at most "
            f"{2 * width - options.rope_dim} of this model's keys and values."
        )
    if (head // 2) % options.fold:
        raise ConfigError(f"fold={options.fold} is not allowed: it must divide {head // 2} frequencies.")
    if options.export == "vllm":
        _require_vllm(options, source)


def _require_vllm(options: ConvertOptions, source: SourceModel) -> None:
    """Raise `ConfigError` for what vLLM's DeepSeek-V3 cannot say."""
    instead = "give --export transformers."
    if source.attention.qkv_bias or source.attention.output_bias:
        raise ConfigError(f"--export vllm cannot carry the biases of this model's attention: {instead}")
    if source.config.moe is not None:
        raise ConfigError(f"--export vllm cannot carry the experts of this model: {instead}")
    if options.method != "weighted":
        raise ConfigError(f"--export vllm chooses the frequencies by itself, not by method={options.method}: {instead}")
    most = 2 * largest_grid(source.frequencies)
    if not most:
        kind = source.config.rope.kind
        raise ConfigError(f"--export vllm cannot say the frequencies of this model's RoPE ({kind}): {instead}")
    if options.rope_dim is not None and not grid_steps(source.frequencies, options.rope_dim // 2):
        raise ConfigError(
            f"--rope-dim={options.rope_dim} is not allowed with --export vllm, which takes frequencies of this model "
            f"that form a plain RoPE: give at most {most}, or {instead.removeprefix('give ')}"
        )


def possible_sizes(options: ConvertOptions, source: SourceModel) -> list[tuple[int, int]]:
    """The (rank, rope_dim) that come into question."""
    width, head = source.shape.kv_width, source.shape.head_dim
    if options.rank is not None and options.rope_dim is not None:
        return [(options.rank, options.rope_dim)]
    total = int((options.kv_budget or 1) * 2 * width)
    step = max(2, head // 8 // 2 * 2)
    dims = [options.rope_dim] if options.rope_dim else range(step, min(2 * head, width, total - 1) + 1, step)
    if options.export == "vllm":
        dims = [dim for dim in dims if grid_steps(source.frequencies, dim // 2)]
    found = [(min(total - dim, 2 * width - dim), dim) for dim in dims if total - dim >= 1]
    if not found:
        raise ConfigError(f"--kv-budget={options.kv_budget:g} leaves {total} numbers a token: too few for this model.")
    return found
