"""`latentkv inspect`: what a checkpoint is, without loading it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from latentkv.cli.loading import model_folder
from latentkv.cli.terminal import console, print_json
from latentkv.option_types import Flag
from latentkv.options import ModelName

if TYPE_CHECKING:
    from rich.table import Table

    from latentkv.cli.checkpoint_facts import CheckpointFacts, KindFact


def inspect(name: ModelName, /, *, tensors: bool = False, as_json: Annotated[bool, Flag(("--json",))] = False) -> None:
    """Show what a checkpoint is: family, shapes, weights, tokenizer, cost of its cache. Checks every file's header.

    Args:
        name: the model.
        tensors: list every tensor.
        as_json: print JSON, sizes in bytes.
    """
    from latentkv.cli.checkpoint_facts import read_facts

    facts = read_facts(model_folder(name))
    if as_json:
        value = asdict(facts)
        print_json(value if tensors else {key: item for key, item in value.items() if key != "tensors"})
        return
    _print_facts(facts)
    if tensors:
        console().print(_tensor_table(facts))


def _print_facts(facts: CheckpointFacts) -> None:
    from rich.markup import escape

    from latentkv.sizes import format_count

    out = console()
    out.print(f"[bold]{facts.folder}[/bold]  {facts.model_type}")
    out.print(f"Attention   {_attention(facts)}")
    if facts.recurrent is not None:
        others = facts.num_layers - facts.recurrent_layers
        out.print(
            f"            in {others} layers; {facts.recurrent['kind']} in the other {facts.recurrent_layers}: "
            f"{facts.recurrent['num_heads']} heads of {facts.recurrent['head_dim']}"
        )
    tied = ", shared with the output head" if facts.tied_embeddings else ""
    out.print(
        f"Shape       {facts.num_layers} layers, hidden {facts.hidden_size:,}, feed-forward "
        f"{facts.intermediate_size:,}, vocabulary {facts.vocab_size:,}{tied}"
    )
    out.print(f"Experts     {_experts(facts)}")
    if streams := facts.residual_streams:
        how = "mixed around each block" if "sinkhorn_iterations" in streams else "added to by each block"
        out.print(f"Residual    {streams['num_streams']} streams, {how} (hyper-connections)")
    out.print(f"Context     {facts.max_context:,} tokens; {_rope(facts)}")
    used = facts.active_parameters
    share = f", {format_count(used)} of them used for each token" if used < facts.parameters else ""
    out.print(f"Runs in     {facts.dtype}")
    out.print(f"Parameters  {format_count(facts.parameters)} ({facts.parameters:,}){share}")
    if facts.parameters_stored != facts.parameters:
        out.print(f"            [yellow]the files hold {facts.parameters_stored:,}[/yellow]")
    if facts.problem is not None:
        out.print(f"            [yellow]this checkpoint will not load: {escape(facts.problem)}[/yellow]")
    for note in facts.notes:
        out.print(f"            [yellow]{escape(note)}[/yellow]")
    out.print(f"MTP         {_mtp(facts)}")
    out.print(f"Tokenizer   {_tokenizer(facts)}")
    own, mha = facts.cache_bytes_per_token, facts.mha_cache_bytes_per_token
    out.print(f"KV cache    {own:,} bytes a token in bf16; MHA of this shape: {mha:,} ({mha / own:.1f} times as much)")
    if facts.cache_bytes_per_sequence:
        out.print(f"            and {facts.cache_bytes_per_sequence:,} bytes a sequence, however long, in float32")
    out.print(_weights_table("weights by kind", facts.by_kind))
    out.print(_weights_table("weights by dtype", facts.by_dtype))


def _attention(facts: CheckpointFacts) -> str:
    shape = facts.attention
    if shape["kind"] == "GQA":
        heads, kv_heads = facts.num_heads, shape["num_kv_heads"]
        kind = "MHA" if heads == kv_heads else "MQA" if kv_heads == 1 else "GQA"
        extra = ", QK-norm" if shape["qk_norm"] else ""
        extra += " over all heads" if shape["qk_norm"] and not shape["qk_norm_per_head"] else ""
        window = facts.sliding_window_layers
        extra += f", sliding window in {window} layers" if window else ""
        return f"{kind}: {heads} heads over {kv_heads} key/value heads of {shape['head_dim']}{extra}"
    query = f"q_lora_rank {shape['q_lora_rank']}" if shape["q_lora_rank"] else "no q_lora"
    sparse = ""
    if indexer := facts.indexer:
        pools = f" in pools of {indexer['pool']}" if indexer["pool"] else ""
        sparse = (
            f"; sparse: {indexer['topk']:,} tokens{pools} selected by {indexer['num_heads']} index heads of "
            f"{indexer['head_dim']} in {facts.indexer_layers} layers"
        )
        sparse += f", shared with {shared} more" if (shared := facts.selection_sharing_layers) else ""
    gate = f", gated by {shape['output_gate']}" if shape["output_gate"] else ""
    gate += ", a sink a head" if shape["sinks"] else ""
    return (
        f"MLA: {facts.num_heads} heads, kv_lora_rank {shape['kv_lora_rank']}, {query}, head dims "
        f"{shape['qk_nope_head_dim']} nope + {shape['qk_rope_head_dim']} rope, {shape['v_head_dim']} value"
        f"{gate}{sparse}"
    )


def _experts(facts: CheckpointFacts) -> str:
    moe = facts.moe
    if moe is None:
        return "none, every layer is dense"
    groups = f", from {moe['topk_group']} of {moe['num_groups']} groups" if moe["group_score"] else ""
    gated = moe["gated_shared_size"]
    shared = f"a gated one of {gated:,}" if gated else f"{moe['num_shared_experts'] or 'none'} shared"
    none = f" and {zero} zero experts" if (zero := moe["num_zero_experts"]) else ""
    beside = ", beside dense blocks" if facts.shortcut_layers else ""
    return (
        f"{moe['experts_per_token']} of {moe['num_experts']} routed{none} ({moe['scoring']}{groups}) and "
        f"{shared}, of width {moe['intermediate_size']:,}, in {facts.moe_layers} layers{beside}"
    )


def _rope(facts: CheckpointFacts) -> str:
    rope = facts.rope
    if rope["kind"] == "none":
        return "no rotary embedding"
    scaling = "unscaled" if rope["kind"] == "default" else f"{rope['kind']} x {rope['factor']:g}"
    if rope["kind"] != "default" and rope["original_max_positions"]:
        scaling += f" from {rope['original_max_positions']:,}"
    pairs = "interleaved" if rope["interleaved"] else "half-split"
    head = facts.attention.get("head_dim", rope["dim"])
    part = "" if head == rope["dim"] else f", {rope['dim']} of a head's {head} dimensions"
    return f"RoPE theta {rope['theta']:g}{part}, {pairs}, {scaling}"


def _mtp(facts: CheckpointFacts) -> str:
    if not facts.mtp_layers_in_config:
        return "none"
    counted = facts.mtp_layers_in_config
    return f"{facts.mtp_layers_stored} of the {counted} multi-token-prediction layers that the config counts are stored"


def _tokenizer(facts: CheckpointFacts) -> str:
    tokenizer = facts.tokenizer
    if tokenizer is None:
        return "none: this checkpoint serves token ids only"
    if tokenizer.needed_size > facts.vocab_size:
        return f"[yellow]{tokenizer.vocab_size:,} tokens, more than the model has: they do not match[/yellow]"
    ends = ", ".join(map(str, tokenizer.eos_ids)) or "none"
    if tokenizer.turn_end_id is not None and tokenizer.turn_end_id not in tokenizer.eos_ids:
        ends += f" and {tokenizer.turn_end_id}, which closes turns in the chat template"
    template = "the checkpoint's own" if tokenizer.chat_template == "checkpoint" else "a plain one (it brings none)"
    begin = "none" if tokenizer.bos_id is None else tokenizer.bos_id
    return f"{tokenizer.vocab_size:,} tokens, begin {begin}, end {ends}; chat template: {template}"


def _weights_table(title: str, groups: dict[str, KindFact]) -> Table:
    from rich.table import Table

    from latentkv.sizes import format_bytes

    table = Table()
    table.add_column(title)
    for column in ("tensors", "parameters", "size"):
        table.add_column(column, justify="right")
    for name, group in sorted(groups.items(), key=lambda item: -item[1].bytes):
        table.add_row(name, f"{group.tensors:,}", f"{group.parameters:,}", format_bytes(group.bytes))
    return table


def _tensor_table(facts: CheckpointFacts) -> Table:
    from rich.table import Table

    table = Table("tensor", "kind", "dtype", "shape")
    table.add_column("bytes", justify="right")
    for tensor in facts.tensors:
        table.add_row(tensor.name, tensor.kind, tensor.dtype, " x ".join(map(str, tensor.shape)), f"{tensor.bytes:,}")
    return table
