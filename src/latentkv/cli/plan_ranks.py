"""`latentkv plan MODEL --ranks N`: a model in several processes, printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from latentkv.cli.terminal import console
from latentkv.errors import ConfigError

if TYPE_CHECKING:
    from latentkv.models.config import ModelConfig
    from latentkv.plan import Plan
    from latentkv.plan.ranks import Network, RanksPlan

_LARGE_BATCH = 32


def plan_model_ranks(
    config: ModelConfig,
    plan: Plan,
    num_ranks: int,
    *,
    ranks_per_box: int,
    network: str,
    memory_bandwidth: float | None,
    measure: bool,
) -> list[RanksPlan]:
    """The cuts of a model that has been planned for one process, the best first; under torchrun one rank returns.

    Raises:
        ConfigError: its weights are of several types, or the model cannot be cut so often.
        RequestError: a number is out of range.
    """
    from latentkv.models.parameters import WEIGHT_DTYPES
    from latentkv.plan import as_kv_format
    from latentkv.plan.ranks import Network, best_plans

    if plan.weights_dtype not in WEIGHT_DTYPES:
        raise ConfigError(
            f"The weights of {plan.model} are of several types ({plan.weights_dtype}): say which to count by "
            "--weights-dtype."
        )
    between = _measured(num_ranks, config) if measure else Network.parse(network)
    if memory_bandwidth is None:
        from latentkv.bench.ceilings import measure_ceilings

        memory_bandwidth = measure_ceilings(gemm_size=256, repeats=3).read_gbps * 1e9
    return best_plans(
        config,
        num_ranks,
        rank_memory=plan.memory[0].free,
        weights_dtype=plan.weights_dtype,
        context=plan.context,
        kv_dtype=as_kv_format(plan.cache[0].kv_dtype),
        batches=tuple(sorted({plan.batch, 1, _LARGE_BATCH}, key=lambda batch: (batch != plan.batch, batch))),
        network=between,
        memory_bandwidth=memory_bandwidth,
        ranks_per_box=ranks_per_box,
    )


def _measured(num_ranks: int, config: ModelConfig) -> Network:
    """What messages between the ranks take; ranks that are not the first end here."""
    from latentkv.models.stored_config import stored_dtype
    from latentkv.parallel import join
    from latentkv.parallel.measure import measure_hops
    from latentkv.plan.ranks import Network

    ranks = join(num_ranks, timeout=60)
    small, rate = measure_hops(ranks, config.hidden_size * stored_dtype(config).itemsize)
    ranks.leave()
    if not ranks.is_driver:
        raise typer.Exit
    return Network(rate, small)


def print_ranks(plan: Plan, cuts: list[RanksPlan]) -> None:
    """Print what each rank has in the best cut, how fast the ranks of each could be together, and what to type."""
    from rich.table import Table

    from latentkv.sizes import format_bytes

    out, cut = console(), cuts[0]
    cache = f"{plan.batch} x {plan.context:,} tokens"
    title = f"{plan.model} in {len(cut.ranks)} ranks, weights in {plan.weights_dtype}, {cache}"
    table = Table(title=title, title_justify="left")
    for heading in ("rank", "layers", "weights", "KV cache", "together"):
        table.add_column(heading, justify="right")
    table.add_column("fits")
    for row in cut.ranks:
        part = "" if cut.team_size == 1 else f", part {row.rank % cut.team_size + 1} of {cut.team_size}"
        layers = f"{row.first_layer}-{row.last_layer}{part}" + (", embedding, head" if row.rank == 0 else "")
        sizes = [
            format_bytes(size) for size in (row.weights_bytes, row.cache_bytes, row.weights_bytes + row.cache_bytes)
        ]
        table.add_row(str(row.rank), layers, *sizes, "yes" if row.fits else "[red]no[/red]")
    out.print(table)
    speeds = Table(title="Tokens a second at most, by the bytes", title_justify="left")
    for heading in ("sequences", "one process with all"):
        speeds.add_column(heading, justify="right")
    for each in cuts:
        for heading in (_how(each), "memory, ms", "network, ms"):
            speeds.add_column(heading, justify="right")
    for together in zip(*(each.speeds for each in cuts), strict=True):
        shown = [together[0].one_rank]
        for speed in together:
            shown += [speed.pipeline, speed.memory_ms, speed.network_ms]
        speeds.add_row(str(together[0].batch), *(f"{value:,.4g}" for value in shown))
    out.print(speeds)
    rate, hop = cut.network.bytes_per_second / 1e9, cut.network.hop_seconds * 1e6
    out.print(
        f"A rank reads {cut.memory_bandwidth / 1e9:,.0f} GB/s; between machines {rate:,.2f} GB/s and {hop:,.0f} us a "
        "message. Arithmetic is not counted: these are upper bounds.",
        style="dim",
    )
    if not cut.fits:
        out.print(f"[red]A rank may fill {format_bytes(cut.rank_memory)}: take more ranks, or fewer bits.[/red]")
    elif cut.one_rank_fits:
        faster = "make one answer faster, but" if cut.team_size > 1 else "make one answer no faster, and"
        out.print(
            f"It fits into one process: ranks {faster} servers of their own behind a proxy answer more requests in all."
        )
    out.print(_command(plan.model, cut), markup=False, soft_wrap=True)


def _how(cut: RanksPlan) -> str:
    """A cut in words, for the head of a column."""
    stages = len(cut.ranks) // cut.team_size
    if cut.team_size == 1:
        return f"{stages} ranks"
    return f"{cut.team_size} ranks on each layer" if stages == 1 else f"{stages} stages of {cut.team_size} ranks"


def _command(model: str, cut: RanksPlan) -> str:
    count, local, stages = len(cut.ranks), cut.ranks_per_box, len(cut.ranks) // cut.team_size
    options = [f"--pipeline-parallel {stages}"] if stages > 1 or cut.team_size == 1 else []
    options += [f"--tensor-parallel {cut.team_size}"] if cut.team_size > 1 else []
    if local >= count:
        return f"latentkv serve {model} {' '.join(options)}"
    return (
        f"On each of {-(-count // local)} machines, BOX0 being the first:\n"
        f"torchrun --nnodes {-(-count // local)} --nproc-per-node {local} --rdzv-backend c10d "
        f"--rdzv-endpoint BOX0:29500 --rdzv-id latentkv -m latentkv serve {model} {' '.join(options)}"
    )
