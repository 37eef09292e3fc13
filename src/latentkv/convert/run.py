"""`convert_checkpoint`: a grouped-query model into a latent-attention one, layer by layer, through little memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentkv.convert.calibration import LayerView, positions_of, view_layer
from latentkv.convert.export import export_layer, has_biases
from latentkv.convert.export_config import export_config, latent_norm_eps, read_by, ties_head
from latentkv.convert.fit import possible_sizes, require_fit
from latentkv.convert.layer import ConvertedLayer, LayerPlan, convert_layer, rope_gains
from latentkv.convert.options import ConvertOptions
from latentkv.convert.refit import Stream, refit_layer
from latentkv.convert.report import CacheBytes, ConversionReport, LayerRow
from latentkv.convert.source import SourceModel, open_source
from latentkv.convert.states import HiddenStates
from latentkv.convert.target import TargetFolder, require_target, resumable_folder
from latentkv.fingerprint import file_states, fingerprint
from latentkv.llm_options import kv_format
from latentkv.models.config import ModelConfig
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import DecoderLayer
from latentkv.models.rope import Rotary, rotary
from latentkv.models.stored_config import stored_dtype
from latentkv.saved_values import as_saved

BALANCES = (1 / 16, 1 / 4, 1.0, 4.0)
"""Of keys against values, as multiples of what is predicted; the one with the least measured error is taken."""
HELD_OUT = 0.125
"""Of the calibration sequences, on which sizes and balance are chosen."""


def require_convertible(folder: Path, options: ConvertOptions) -> SourceModel:
    """The source, if it can be converted like this; else the error of `convert_checkpoint`, before any text is read."""
    source = open_source(folder)
    require_fit(options, source)
    possible_sizes(options, source)
    return source


def convert_checkpoint(
    folder: Path,
    target: Path,
    tokens: Tensor,
    options: ConvertOptions,
    *,
    on_progress: Callable[[str, int, int], object] = lambda what, done, total: None,
) -> ConversionReport:
    """Write a latent-attention model made of a grouped-query one: a dense DeepSeek-V3 checkpoint.

    Memory holds about one layer; hidden states lie in files. The text goes through the source once (sizes and RoPE are
    chosen for all layers together), and then through the converted layers, so that each makes up for those before it.
    Each file gets its name when it is whole, config.json last; the same call after an interruption goes on.

    Args:
        folder: of the source, or its GGUF file.
        target: a new folder, or one of an interrupted run of the same conversion.
        tokens: [sequences, length] int64 calibration text.
        options: sizes and method.
        on_progress: called with what is done, how many layers are, and of how many.

    Raises:
        ConfigError: the source or the sizes cannot be converted.
        CheckpointError: the source is damaged; the target holds something else, or cannot be written.
    """
    source = require_convertible(folder, options)
    require_target(target, folder)
    return _Conversion(source, target, tokens, options, on_progress).run()


@dataclass(frozen=True)
class _SavedPlan:
    """Sizes and RoPE that were chosen, and what was forecast of all (rank, rope_dim)."""

    plan: LayerPlan
    forecasts: tuple[tuple[int, int, float], ...]


@dataclass(frozen=True)
class _SavedLayer:
    """What is known of a layer that has been written."""

    row: LayerRow
    frequencies: tuple[float, ...]
    biases: bool


class _Conversion:
    """One run; its state lies in a folder inside of the target until the end."""

    def __init__(
        self,
        source: SourceModel,
        target: Path,
        tokens: Tensor,
        options: ConvertOptions,
        on_progress: Callable[[str, int, int], object],
    ) -> None:
        self._source = source
        self._tokens = tokens
        self._options = options
        self._on_progress = on_progress
        self._positions = positions_of(source, tokens.shape[1])
        self._dtype = _export_dtype(stored_dtype(source.config))
        self._eps = latent_norm_eps(source, options.export)
        decides = [file_states(source.reader.files), asdict(options), list(tokens.shape)]
        self._fingerprint = fingerprint([decides, tokens.numpy().tobytes()])
        self._folder = resumable_folder(target)
        tied = ties_head(source, options.export)
        self._target = TargetFolder(self._folder, source, self._fingerprint, self._dtype, tied=tied)

    def run(self) -> ConversionReport:
        finished = self._folder.finished(self._fingerprint, ConversionReport.from_json)
        if finished is not None:
            return finished
        with self._folder.claimed(self._fingerprint):
            return self._run()

    def _run(self) -> ConversionReport:
        plan, forecasts = self._plan(possible_sizes(self._options, self._source))
        rows, frequencies, biases = self._convert(plan)
        config = self._config(plan, frequencies, biases=biases)
        report = ConversionReport(
            plan.rank,
            plan.rope_dim,
            2 * self._source.shape.kv_width,
            plan.rank + plan.rope_dim,
            CacheBytes.of(self._source.config, read_config(config), kv_format("auto", self._dtype)),
            self._tokens.numel(),
            forecasts,
            tuple(frequencies.tolist()),
            tuple(rows),
            self._options.export,
            read_by(self._source, self._options.export),
        )
        self._target.write_rest(report)
        self._folder.finish(config)
        return report

    def _plan(self, sizes: list[tuple[int, int]]) -> tuple[LayerPlan, tuple[tuple[int, int, float], ...]]:
        """Choose sizes and RoPE for all layers together."""

        def make() -> dict[str, Any]:
            plan, errors = self._survey([LayerPlan(*size, **self._method) for size in sizes])
            forecasts = tuple((*size, error) for size, error in zip(sizes, errors, strict=True)) if errors else ()
            return asdict(_SavedPlan(plan, forecasts))

        def read(values: object) -> _SavedPlan:
            found = as_saved(_SavedPlan, values)
            if (found.plan.rank, found.plan.rope_dim) not in sizes:
                raise ValueError(f"rank {found.plan.rank} and rope_dim {found.plan.rope_dim} are not this conversion's")
            return found

        found = self._folder.step("plan.json", make, read)
        return found.plan, found.forecasts

    @property
    def _first_held_out(self) -> int:
        """The first of the sequences that nothing is fitted to."""
        sequences = self._tokens.shape[0]
        return min(int(sequences * (1 - HELD_OUT)), sequences - 1)

    @property
    def _method(self) -> dict[str, Any]:
        options = self._options
        return {"method": options.method, "fold": options.fold, "grid": options.export == "vllm"}

    def _survey(self, plans: list[LayerPlan]) -> tuple[LayerPlan, list[float]]:
        """The best of the plans, and the mean error of the layers' outputs under each; none if there is no choice."""
        source, layers = self._source, self._source.config.num_layers
        if self._options.method != "weighted":
            return plans[0], []
        states = self._first_states()
        errors, saved = [0.0] * len(plans), torch.zeros(0)
        for index in range(layers):
            view = view_layer(source, index, states)
            for number, plan in enumerate(plans if len(plans) > 1 else ()):
                errors[number] += self._output_error(view, plan, self._candidate(view, plan, 1.0), states) / layers
            found = rope_gains(view.weights, view.statistics, source.shape, source.frequencies)
            saved = found if index == 0 else saved + found
            path = self._folder.state / f"survey-{index % 2}.f32"
            states = states.mapped(path, lambda piece, layer=view.layer: layer(piece, self._positions))
            self._on_progress("survey", index + 1, layers)
        best = plans[min(range(len(plans)), key=lambda number: errors[number])]
        counts = best.best_counts(saved, source.frequencies)
        return replace(best, counts=tuple(counts.tolist())), errors if len(plans) > 1 else []

    def _convert(self, plan: LayerPlan) -> tuple[list[LayerRow], Tensor, bool]:
        """Write the layers that are not there yet; rows of all, and what their config needs."""
        layers, states = self._source.config.num_layers, self._first_states()
        stream = states
        rows: list[LayerRow] = []
        frequencies, biases = torch.zeros(0), False
        for index in range(layers):
            after = self._states(f"hidden-{index}.f32")
            stream_after = self._states(f"source-{index}.f32")
            found = self._folder.step(
                f"layer-{index}.json",
                partial(self._convert_layer, index, plan, states, after, stream, stream_after),
                lambda values: as_saved(_SavedLayer, values),
            )
            if index:
                states.path.unlink(missing_ok=True)
                stream.path.unlink(missing_ok=True)
            rows.append(found.row)
            frequencies, biases = torch.tensor(found.frequencies, dtype=torch.float64), found.biases
            states, stream = after, stream_after
            self._on_progress("convert", index + 1, layers)
        return rows, frequencies, biases

    def _convert_layer(
        self,
        index: int,
        plan: LayerPlan,
        states: HiddenStates,
        after: HiddenStates,
        source: HiddenStates,
        source_after: HiddenStates,
    ) -> dict[str, Any]:
        """Write a layer and its outputs, which the next one is calibrated on; what is kept of it.

        Args:
            index: of the layer.
            plan: of all layers.
            states: what the converted layer reads.
            after: where its outputs go.
            source: what the source's layer reads in the source itself.
            source_after: where its outputs go.
        """
        converted, row = self._best_layer(index, plan, states)
        biases = has_biases(converted.weights)
        attention = export_layer(converted.weights, eps=self._eps)
        named = ((f"self_attn.{name}", tensor) for name, tensor in attention.items())
        tensors = {name: tensor * self._source.multiplier(name) for name, tensor in named}
        self._target.write_layer(index, tensors)
        config = read_config(self._config(plan, converted.frequencies, biases=biases))
        with torch.device("meta"):
            layer = DecoderLayer(config, config.layers[index], max_context=config.max_positions)
        layer.load_state_dict(dict(self._target.read_layer(index)), assign=True)
        angles = self._angles(config)
        stream = self._source_stream(index, source, source_after)
        refitted = refit_layer(layer, angles, states, stream, self._options.refits, self._first_held_out)
        if refitted:
            self._target.write_layer(index, tensors | refitted)
            layer.load_state_dict(dict(self._target.read_layer(index)), assign=True)
        lost = states.mapped(after.path, lambda piece: layer(piece, angles)).relative_error(
            stream.after, self._first_held_out
        )
        row = replace(row, stream_error=lost)
        return asdict(_SavedLayer(row, tuple(converted.frequencies.tolist()), biases))

    def _source_stream(self, index: int, states: HiddenStates, after: HiddenStates) -> Stream:
        """The source's own stream around a layer of it."""
        layer = self._source.layer(index)
        between = states.mapped(
            self._states("source-between.f32").path, lambda piece: layer.between(piece, self._positions)
        )
        return Stream(between, states.mapped(after.path, lambda piece: layer(piece, self._positions)))

    def _best_layer(self, index: int, plan: LayerPlan, states: HiddenStates) -> tuple[ConvertedLayer, LayerRow]:
        """Convert with every balance, and take the one whose attention comes nearest to the source's."""
        view = view_layer(self._source, index, states, feed_forward=False)
        balances = BALANCES if plan.method == "weighted" else (1.0,)
        # One after another: more than the best and the next would double what memory holds.
        tried = (self._try(view, plan, balance, states) for balance in balances)
        error, balance, chosen = min(tried, key=lambda found: found[0])
        return chosen, LayerRow(
            index,
            balance,
            error,
            chosen.rope_energy,
            chosen.kept_energy,
            stream_error=math.nan,  # known when the layer has been written
            norm_variation=view.norm_variation,
        )

    def _try(
        self, view: LayerView, plan: LayerPlan, balance: float, states: HiddenStates
    ) -> tuple[float, float, ConvertedLayer]:
        """The error of the output with a balance, that balance, and the layer."""
        candidate = self._candidate(view, plan, balance)
        return self._output_error(view, plan, candidate, states), balance, candidate

    def _candidate(self, view: LayerView, plan: LayerPlan, balance: float) -> ConvertedLayer:
        source = self._source
        return convert_layer(
            view.weights, view.statistics, plan, source.shape, source.frequencies, source.scale, balance=balance
        )

    @torch.no_grad()
    def _output_error(self, view: LayerView, plan: LayerPlan, candidate: ConvertedLayer, states: HiddenStates) -> float:
        """|converted - source|^2 / |source|^2 of the attention's output, on the calibration text that is held out."""
        config = read_config(self._config(plan, candidate.frequencies, biases=has_biases(candidate.weights)))
        with torch.device("meta"):
            attention = DecoderLayer(config, config.layers[0], max_context=config.max_positions).self_attn
        tensors = export_layer(candidate.weights, eps=self._eps)
        attention.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
        angles = self._angles(config)
        error = energy = 0.0
        for piece in states.pieces(self._first_held_out):
            x = view.layer.input_layernorm(piece)
            wanted = view.layer.self_attn(x, self._positions)
            error += float((attention(x, angles) - wanted).double().square().sum())
            energy += float(wanted.double().square().sum())
        return error / energy

    def _config(self, plan: LayerPlan, frequencies: Tensor, *, biases: bool) -> dict[str, Any]:
        dtype = str(self._dtype).removeprefix("torch.")
        return export_config(self._source, plan, frequencies, biases=biases, dtype=dtype, export=self._options.export)

    def _angles(self, config: ModelConfig) -> Rotary:
        return rotary(config.rope, torch.arange(self._tokens.shape[1])[None], max_context=config.max_positions)

    def _states(self, name: str) -> HiddenStates:
        shape = (self._tokens.shape[0], self._tokens.shape[1], self._source.config.hidden_size)
        return HiddenStates(self._folder.state / name, shape)

    def _first_states(self) -> HiddenStates:
        """What the first layer reads."""
        states = self._states("input.f32")
        if not states.path.exists():
            table = self._source.folded("model.embed_tokens.weight", torch.float32)
            states.write(table[row[None]] for row in self._tokens)
        return states


def _export_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 cannot hold what makes the latent's norm linear."""
    return torch.bfloat16 if dtype == torch.float16 else dtype
