"""`latentkv plan`: what a model needs, before anything is downloaded."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from latentkv.cli.terminal import console, print_json
from latentkv.errors import RequestError
from latentkv.option_types import Bytes, Flag, KVDtype, Tokens
from latentkv.ranges import Range

if TYPE_CHECKING:
    from rich.table import Table

    from latentkv.plan import CacheRow, Memory, Plan


def plan(
    model: Annotated[str | None, Flag(("--model", "-m"))] = None,
    /,
    *,
    context: Annotated[Tokens | None, Flag(("--context", "-c", "--ctx-size", "--max-model-len"))] = None,
    batch: int = 1,
    kv_dtype: KVDtype = "bf16",
    weights_dtype: str | None = None,
    memory: Bytes | None = None,
    ranks: Annotated[int | None, Range(1, 1024)] = None,
    ranks_per_box: Annotated[int, Range(1)] = 1,
    network: str = "10Gb",
    memory_bandwidth: Bytes | None = None,
    measure: bool = False,
    plot: Path | None = None,
    as_json: Annotated[bool, Flag(("--json",))] = False,
) -> None:
    """Show the memory that a model needs: its weights, and its KV cache as MLA, MHA, GQA and MQA side by side.

    Example: latentkv plan deepseek-v3 --context 128k --batch 8 --kv-dtype fp8

    Args:
        model: a folder, its config.json, a .gguf file, or a repo id, also as org/name@revision (only its config is
            fetched), or a built-in shape: deepseek-v2-lite, deepseek-v2, deepseek-v3, deepseek-v3.2, kimi-k2,
            kimi-k2.5, glm-4.7-flash, glm-5.2, mistral-small-4, a.x-k1, a.x-k2-light, minicpm3-4b, youtu-llm-2b,
            moonlight-16b, ling-3.0-tiny, ling-3.0-flash, ling-2.6-flash, kimi-linear-48b, glm-5.3-flash, longcat-flash,
            qwen3-30b-a3b, mixtral-8x7b, glm-4.5-air; None is the caches of all with MLA.
        context: tokens of each sequence, like 4096 or 128k; None is the model's longest.
        batch: sequences at the same time.
        kv_dtype: format of the cache: bf16, fp8, int8, fp16 or fp32.
        weights_dtype: format of the weights: bf16, fp16, fp32, fp8, int8 or int4; None is as the checkpoint stores
            them.
        memory: memory to fit into, like 24GiB; None is what is free on this machine.
        ranks: also cut the model into so many processes, and say what that brings.
        ranks_per_box: how many of these are on one machine.
        network: what is between machines: its rate, like 10Gb, or 10Gb:50us with the time of a message.
        memory_bandwidth: bytes a second that a rank reads, like 100GB; None is measured on this machine.
        measure: under torchrun: measure messages between the ranks instead of `network`.
        plot: without a model: draw the bytes a token into this PNG.
        as_json: print JSON, all sizes in bytes.
    """
    if ranks is None and measure:
        raise RequestError("--measure is for --ranks, and is run as torchrun --nproc-per-node N -m latentkv plan ...")
    if ranks is not None and model is None:
        raise RequestError("--ranks cuts one model: name it.")
    from latentkv.models.config import MLAConfig
    from latentkv.plan import BUILT_IN, Memory, load_config, machine_memory, make_plan, stored_weights

    room = machine_memory() if memory is None else (Memory("memory given", memory, memory),)
    configs = {name: load_config(name) for name in (BUILT_IN if model is None else (model,))}
    if model is None:  # the table and the picture compare latents with what the same heads would cache
        configs = {name: config for name, config in configs.items() if isinstance(config.cached_attention, MLAConfig)}
    plans = [
        make_plan(
            name,
            config,
            memory=room,
            context=context,
            batch=batch,
            kv_dtype=kv_dtype,
            weights_dtype=weights_dtype,
            stored=stored_weights(name, config),
        )
        for name, config in configs.items()
    ]
    if plot is not None:
        if model is not None:
            raise RequestError("--plot compares built-in shapes: leave MODEL out.")
        from latentkv.plan.plot import plot_caches

        plot_caches(plans, plot)
    if ranks is not None and model is not None:
        from latentkv.cli.plan_ranks import plan_model_ranks, print_ranks

        cuts = plan_model_ranks(
            configs[model],
            plans[0],
            ranks,
            ranks_per_box=ranks_per_box,
            network=network,
            memory_bandwidth=memory_bandwidth,
            measure=measure,
        )
        if as_json:
            best, *others = map(asdict, cuts)
            print_json({**asdict(plans[0]), "ranks": best | {"alternatives": others}})
        else:
            print_ranks(plans[0], cuts)
        return
    if as_json:
        print_json(asdict(plans[0]) if model is not None else [asdict(one) for one in plans])
    elif model is not None:
        _print_plan(plans[0])
    else:
        _print_overview(plans)


def _print_overview(plans: list[Plan]) -> None:
    from rich.table import Table

    from latentkv.sizes import format_bytes

    table = Table(title="KV cache, bytes a token (all layers)", title_justify="left")
    table.add_column("model", no_wrap=True)
    own = plans[0].cache[0].kv_dtype
    for title in (f"MLA {own}", "of MHA", "MLA int8", "of MHA", "MHA", "GQA-8", "MQA", "a sequence"):
        table.add_column(title, justify="right")
    for one in plans:
        sizes = {row.kv_heads: row.bytes_per_token for row in one.cache}
        mla, mha, int8 = one.cache[0].bytes_per_token, one.cache[1].bytes_per_token, one.kv_dtypes["int8"]
        shown = [mla, f"1/{mha / mla:.1f}", int8, f"1/{mha / int8:.1f}", mha, sizes.get(8, "-"), sizes.get(1, "-")]
        shown.append(f"+ {format_bytes(fixed)}" if (fixed := one.cache[0].bytes_per_sequence) else "-")
        table.add_row(one.model, *(f"{value:,}" if isinstance(value, int) else value for value in shown))
    out = console()
    out.print(table)
    out.print(
        "MHA, GQA and MQA in bf16 with heads of the same width. A sequence: of recurrent layers, however long it is. "
        "Name one model to see what fits.",
        style="dim",
    )


def _print_plan(result: Plan) -> None:
    from latentkv.sizes import format_bytes, format_count

    out = console()
    out.print(f"[bold]{result.model}[/bold]  {result.model_type}, {result.num_layers} layers, {result.num_heads} heads")
    active = result.active_parameters
    share = f", {format_count(active)} of them used for each token" if active < result.parameters else ""
    extra = f"; multi-token prediction adds {format_count(result.mtp_parameters)}" if result.mtp_parameters else ""
    out.print(f"Parameters  {format_count(result.parameters)} ({result.parameters:,}){share}{extra}")
    unpacked = " (LatentKV unpacks fp8 to bf16 as it loads: see --weights-dtype bf16)"
    note = unpacked if result.weights_dtype == "fp8" else ""
    out.print(f"Weights     {format_bytes(result.weights_bytes)} in {result.weights_dtype}{note}")
    beyond = f"; the model was made for {result.max_context:,}" if result.context > result.max_context else ""
    out.print(f"KV cache    {_sequences(result)} of {result.context:,} tokens, in pages of {result.page_size}{beyond}")
    out.print()
    out.print(_cache_table(result))
    formats = ", ".join(f"{name} {size:,} B" for name, size in result.kv_dtypes.items())
    out.print(f"This model's cache a token, by --kv-dtype: {formats}.")
    if result.cache[0].bytes_per_sequence:
        out.print("What its recurrent layers keep of a sequence is float32, the same for every length.")
    if result.mtp_cache_bytes:
        out.print(f"Drafts by multi-token prediction add {format_bytes(result.mtp_cache_bytes)} to the cache.")
    out.print(
        f"The others in bf16 with heads of the same width: layers x KV heads x ({result.qk_head_dim} key + "
        f"{result.v_head_dim} value) x 2 bytes. Bytes only: another attention would be another model.",
        style="dim",
    )
    out.print()
    for memory in result.memory:
        out.print(verdict(result, memory))
    out.print("Working memory (activations, the program itself) is not counted.", style="dim")


def _cache_table(result: Plan) -> Table:
    from rich.table import Table

    from latentkv.sizes import format_bytes

    table = Table()
    table.add_column("attention", no_wrap=True)
    recurrent = result.cache[0].bytes_per_sequence > 0
    fixed = ("a sequence",) if recurrent else ()
    for title in ("format", "bytes a token", *fixed, "KV cache", "of MHA", "fits up to"):
        table.add_column(title, justify="right")
    for row in result.cache:
        table.add_row(
            f"{row.attention} (this model)" if row.this_model else row.attention,
            row.kv_dtype,
            f"{row.bytes_per_token:,}",
            *([f"+ {format_bytes(row.bytes_per_sequence)}" if row.bytes_per_sequence else ""] if recurrent else []),
            format_bytes(row.cache_bytes),
            _ratio(row),
            "\n".join(f"{tokens:,}" if tokens else "none" for tokens in row.longest_context.values()),
            style="bold" if row.this_model else None,
        )
    return table


def _ratio(row: CacheRow) -> str:
    return "1" if row.ratio_to_mha == 1 else f"1/{1 / row.ratio_to_mha:.1f}"


def _sequences(result: Plan) -> str:
    return f"{result.batch} sequences" if result.batch > 1 else "one sequence"


def verdict(result: Plan, memory: Memory) -> str:
    """Whether a model fits into a memory, in rich's markup."""
    from latentkv.sizes import format_bytes

    own, name, total, free = result.cache[0], memory.name, memory.total, memory.free
    size = format_bytes(free) if free == total else f"{format_bytes(free)} free of {format_bytes(total)}"
    needed = format_bytes(result.weights_bytes + own.cache_bytes)
    longest = own.longest_context[name]
    if not longest:
        return f"[red]{name} ({size}): the weights alone do not fit.[/red]"
    each = " each" if result.batch > 1 else ""
    limit = f" (the model was made for {result.max_context:,})" if longest > result.max_context else ""
    room = f"the longest context that fits {_sequences(result)} is {longest:,} tokens{each}{limit}"
    if own.fits[name]:
        return f"[green]{name} ({size}): weights and cache fit, {needed} in all[/green]; {room}."
    return f"[yellow]{name} ({size}): weights and cache need {needed}, too much[/yellow]; {room}."
