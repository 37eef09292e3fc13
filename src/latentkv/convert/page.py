"""A conversion's report as one page that needs nothing from outside: what was saved, and what it cost."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from html import escape
from typing import Any

from latentkv.convert.plots import DARK, LIGHT, Theme, plot_healing, plot_layers, plot_sizes
from latentkv.convert.stages import Stages, stages_of, text_of
from latentkv.html_page import card, count, digits, folded, machine, page, table

Record = Mapping[str, Any]


def render_page(record: Record) -> str:
    """The page of what `report.json` holds; what is not in the record is left out."""
    stages = stages_of(record)
    source = escape(str(record.get("source", "a converted model")))
    parts = [
        f"<h1>{source}, converted to latent attention</h1>",
        _summary(record, stages),
        _cards(record, stages),
        _stage_table(record, stages),
        _conversion_plots(record),
        _healing(record),
        _layers(record),
        _origin(record),
    ]
    return page(f"{source}: conversion", parts)


def _summary(record: Record, stages: Stages) -> str:
    """One sentence: what was saved, and what it cost."""
    said: list[str] = []
    if "cache" in record:
        before, after = record["cache"]["before"], record["cache"]["after"]
        said.append(f"The KV cache takes {_share(after, before)} of the source's")
    if stages.last is not None:
        when = "after healing" if stages.healed else "before any healing"
        said.append(f"perplexity is {_change(stages.last['converted'], stages.last['source'])} {when}")
    return f"<p>{'; '.join(said)}.</p>" if said else ""


def _cards(record: Record, stages: Stages) -> str:
    cards: list[str] = []
    if "cache" in record:
        cache = record["cache"]
        number = f"&minus;{1 - cache['after'] / cache['before']:.0%}"
        cards.append(card("KV cache", number, f"{cache['before']:,} &rarr; {cache['after']:,} bytes a token"))
    if (last := stages.last) is not None:
        cards.append(
            card(
                "Perplexity",
                f"{last['converted'] / last['source'] - 1:+.1%}".replace("-", "&minus;"),
                f"{digits(last['source'])} &rarr; {digits(last['converted'])}",
            )
        )
        cards.append(card("Likeliest token the same", f"{last['agreement']:.1%}", "as in the source"))
    if "speed" in record:
        speed = record["speed"]
        before, after = (speed["tokens_per_second"][name] for name in ("source", "converted"))
        detail = f"{_rate(before)} &rarr; {_rate(after)} tokens a second"
        cards.append(card(f"Decode at {speed['depth']:,} tokens", f"{after / before:.2f}&times;", detail))
    return f'<div class="row">{"".join(cards)}</div>' if cards else ""


def _stage_table(record: Record, stages: Stages) -> str:
    """Source, converted, healed: a row a measure."""
    models = [stages.converted, *([stages.healed] if record.get("healings") else [])]
    rows: list[list[str]] = []
    if (known := stages.last) is not None:
        rows += [
            ["perplexity", digits(known["source"]), *(_cell(model, _perplexity) for model in models)],
            [
                "KL to the source, nats a token",
                "",
                *(_cell(model, lambda q: f"{q['divergence']:.4f}") for model in models),
            ],
            ["likeliest token the same", "", *(_cell(model, lambda q: f"{q['agreement']:.1%}") for model in models)],
        ]
    if "cache" in record:
        cache = record["cache"]
        after = f"{cache['after']:,} <small>{_share(cache['after'], cache['before'])}</small>"
        rows.append(
            [f"KV cache, bytes a token ({cache['dtype']}, all layers)", f"{cache['before']:,}", *[after] * len(models)]
        )
    if "speed" in record:
        before, after = (record["speed"]["tokens_per_second"][name] for name in ("source", "converted"))
        as_converted = ["<small>as converted</small>"] * (len(models) - 1)
        converted = f"{_rate(after)} <small>{after / before:.2f}&times;</small>"
        rows.append(["decode, tokens a second", _rate(before), converted, *as_converted])
    if not rows:
        return ""
    heads = ["", "source", "converted", "healed"][: 2 + len(models)]
    return (
        f'<div class="row"><section><div class="scroll">{table(heads, rows)}</div>'
        f'<p class="faint">{" ".join(_conditions(record, stages))}</p></section></div>'
    )


def _perplexity(quality: Mapping[str, Any]) -> str:
    change = f"{quality['converted'] / quality['source'] - 1:+.1%}"
    return f"{digits(quality['converted'])} <small>{change}</small>"


def _conditions(record: Record, stages: Stages) -> Iterable[str]:
    """How the numbers of the table were measured."""
    if stages.last is not None:
        text = text_of(record)
        where = "text that the source wrote" if text == "self" else escape(text or "held-out text")
        yield f"Perplexity: {stages.last['tokens']:,} tokens of {where}, which was not trained on."
    if "speed" in record:
        speed = record["speed"]
        yield (
            f"Decode: one sequence with {speed['depth']:,} tokens in the cache, {speed['dtype']} weights "
            f"and cache, {count(speed['threads'], 'thread')}; medians of {speed['repeats']} rounds of "
            f"{speed['new_tokens']} tokens, the two in turn."
        )


def _conversion_plots(record: Record) -> str:
    parts: list[str] = []
    if layers := record.get("layers"):
        worst = max(layers, key=lambda row: row["output_error"])
        parts.append(
            _plot(
                "Error of attention's output, by layer",
                f"Share of the output's energy, on calibration text that was held out. "
                f"Largest: layer {worst['layer']}, {worst['output_error']:.1%}.",
                lambda theme: plot_layers(layers, theme),
            )
        )
    if forecasts := record.get("forecasts"):
        chosen = (record["rank"], record["rope_dim"])
        parts.append(
            _plot(
                "Sizes that were tried",
                f"Mean error of all layers. Taken: rank {chosen[0]} and {chosen[1]} dimensions with RoPE.",
                lambda theme: plot_sizes(forecasts, chosen, theme),
            )
        )
    return f'<div class="row wide">{"".join(parts)}</div>' if parts else ""


def _healing(record: Record) -> str:
    healings: Sequence[Mapping[str, Any]] = record.get("healings", ())
    if not healings:
        return ""
    losses: list[tuple[int, float]] = []
    measures: list[tuple[int, float, float]] = []
    source: float | None = None
    before = 0
    for healing in healings:
        losses += [(before + tokens, loss) for tokens, loss in healing["curve"]]
        for measure in healing["evaluations"]:
            measures.append((before + measure["healing_tokens"], measure["divergence"], measure["converted"]))
            source = measure["source"]
        before += healing["tokens"]
    said = " ".join(_healing_sentence(healing) for healing in healings)
    if not losses:
        return f'<div class="row"><section><h2>Healing</h2><p class="faint">{said}</p></section></div>'
    plot = _plot("Healing", said, lambda theme: plot_healing(losses, measures, source, theme))
    return f'<div class="row">{plot}</div>'


def _healing_sentence(healing: Mapping[str, Any]) -> str:
    trained = {
        "all": "All weights",
        "attention": "Attention's weights",
        "lora": f"Low-rank updates (rank {healing['lora_rank']}) of attention's projections",
    }[healing["train"]]
    matched = f", {healing['match_steps']:,} of them matching layers" if healing["match_steps"] else ""
    return (
        f"{trained} learned what the source predicts, from {healing['tokens']:,} tokens in "
        f"{count(healing['steps'], 'step')}{matched}, {healing['seconds']:,.0f} s."
    )


def _layers(record: Record) -> str:
    if not record.get("layers"):
        return ""
    heads = [
        "layer",
        "error",
        "RoPE energy kept",
        "factors' energy kept",
        "error of the stream after it",
        "balance of keys",
    ]
    rows = [
        [
            str(row["layer"]),
            *(f"{row[name]:.1%}" for name in ("output_error", "rope_energy", "kept_energy")),
            f"{row['stream_error']:.1%}" if "stream_error" in row else "",  # conversions of earlier versions
            f"{row['balance']:g}",
        ]
        for row in record["layers"]
    ]
    return folded("Layer by layer", f'<div class="scroll">{table(heads, rows)}</div>')


def _origin(record: Record) -> str:
    """Commands and machines."""
    runs = [run for run in (record, *record.get("healings", ())) if "command" in run]
    lines = [f"<pre>{escape(run['command'])}</pre><p class='faint'>{machine(run['environment'])}</p>" for run in runs]
    return folded("How it was made", "".join(lines), opened=True) if lines else ""


def _plot(title: str, said: str, draw: Callable[[Theme], bytes]) -> str:
    light, dark = (f"data:image/png;base64,{base64.b64encode(draw(theme)).decode()}" for theme in (LIGHT, DARK))
    return (
        f'<section><h2>{title}</h2><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{title}"></picture><p class="faint">{said}</p></section>'
    )


def _cell(quality: Mapping[str, Any] | None, show: Callable[[Mapping[str, Any]], str]) -> str:
    return "" if quality is None else show(quality)


def _share(part: int, whole: int) -> str:
    """1/2 where that is short, else a percentage."""
    share = Fraction(part, whole)
    return str(share) if share.denominator <= 16 else f"{part / whole:.0%}"


def _rate(speed: float) -> str:
    """Tokens a second; slow models need a digit after the point."""
    return f"{speed:,.{0 if speed >= 100 else 1}f}"


def _change(number: float, reference: float) -> str:
    change = number / reference - 1
    return f"{abs(change):.1%} {'higher' if change >= 0 else 'lower'}"
