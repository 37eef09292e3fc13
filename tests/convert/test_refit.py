"""Output projections are fitted to the source's residual stream by regression, and only where that comes nearer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sources import some_tokens, write_source
from torch import Tensor, nn

from latentkv.convert import ConvertOptions, convert_checkpoint
from latentkv.convert.options import Refit
from latentkv.convert.refit import Stream, moments, refit_layer, regression
from latentkv.convert.states import HiddenStates
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import DecoderLayer
from latentkv.models.loading import load_model
from latentkv.models.rope import Rotary, rotary

SEQUENCES, LENGTH, HELD_OUT = 16, 64, 14
TOKENS = some_tokens(16)
SMALL = ConvertOptions(rank=16, rope_dim=8)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def samples(tokens: int = 300, width: int = 12, outputs: int = 5) -> tuple[Tensor, Tensor]:
    """Multiples of 1/8, whose products float32 sums without rounding."""
    x = normal(tokens, width) @ normal(width, width, seed=1)
    y = x @ normal(width, outputs, seed=2) + normal(tokens, outputs, seed=3)
    return (8 * x).round() / 8, (8 * y).round() / 8


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_the_regression_is_the_least_squares_of_numpy_with_the_ridge_as_further_rows(ridge: float) -> None:
    x, y = samples()
    pieces = zip(x.split(70), y.split(70), strict=True)
    found = regression(*moments(pieces), ridge)
    rows = (ridge * x.double().square().sum(0).mean()).sqrt() * torch.eye(12, dtype=torch.float64)
    longer = torch.cat([x.double(), rows]).numpy(), torch.cat([y.double(), torch.zeros(12, 5)]).numpy()
    expected, *_ = np.linalg.lstsq(*longer, rcond=None)
    np.testing.assert_allclose(found.numpy(), expected.T, rtol=0, atol=1e-10)


def test_what_is_always_zero_gets_no_weight() -> None:
    x, y = samples()
    assert not regression(*moments(iter([(0 * x, y)])), 1e-4).any()


@pytest.fixture(scope="module")
def layer_of(tmp_path_factory: pytest.TempPathFactory) -> tuple[DecoderLayer, Rotary]:
    """A layer of latent attention, and its angles."""
    folder = tmp_path_factory.mktemp("refit")
    convert_checkpoint(write_source("llama", folder / "source"), folder / "out", TOKENS, SMALL)
    config = read_config(folder / "out")
    layer = DecoderLayer(config, config.layers[0], max_context=LENGTH)
    prefix = "model.layers.0."
    tensors = load_file(folder / "out" / "model-00001-of-00003.safetensors")
    layer.load_state_dict({name.removeprefix(prefix): tensor.float() for name, tensor in tensors.items()})
    return layer, rotary(config.rope, torch.arange(LENGTH)[None], max_context=LENGTH)


def states_of(path: Path, values: Tensor) -> HiddenStates:
    states = HiddenStates(path, (SEQUENCES, LENGTH, values.shape[-1]))
    states.write(iter(values.split(4)))
    return states


def with_outputs(layer: DecoderLayer, output: Tensor, down: Tensor) -> DecoderLayer:
    layer.get_submodule("self_attn.o_proj").weight = nn.Parameter(output, requires_grad=False)
    layer.get_submodule("mlp.down_proj").weight = nn.Parameter(down, requires_grad=False)
    return layer


@torch.no_grad()
def stream_of(layer: DecoderLayer, angles: Rotary, states: HiddenStates, folder: Path) -> Stream:
    return Stream(
        states.mapped(folder / "between.f32", lambda piece: layer.between(piece, angles)),
        states.mapped(folder / "after.f32", lambda piece: layer(piece, angles)),
    )


@pytest.mark.parametrize("refit", ["all", "attention", "none"])
def test_what_other_projections_would_have_given_is_found_again(
    refit: Refit, layer_of: tuple[DecoderLayer, Rotary], tmp_path: Path
) -> None:
    layer, angles = layer_of
    x = normal(SEQUENCES, LENGTH, 64)
    x[:, 0] *= 500  # a token of most models is as long as that, and is not to be all that counts
    states = states_of(tmp_path / "x.f32", x)
    output, down = (normal(64, width, seed=width) * 0.1 for width in (128, 96))
    stream = stream_of(with_outputs(layer, output, down), angles, states, tmp_path)
    with_outputs(layer, torch.zeros_like(output), torch.zeros_like(down))
    found = refit_layer(layer, angles, states, stream, refit, HELD_OUT)
    names = {"all": {"self_attn.o_proj.weight", "mlp.down_proj.weight"}, "attention": {"self_attn.o_proj.weight"}}
    assert set(found) == names.get(refit, set())
    for name, weight in found.items():
        assert torch.equal(dict(layer.named_parameters())[name], weight)
    if refit == "all":
        (tmp_path / "again").mkdir()
        again = stream_of(layer, angles, states, tmp_path / "again")
        assert again.after.relative_error(stream.after, 0) < 1e-4


def test_a_fit_that_is_further_away_on_held_out_text_is_not_kept(
    layer_of: tuple[DecoderLayer, Rotary], tmp_path: Path
) -> None:
    layer, angles = layer_of
    layer = with_outputs(layer, normal(64, 128), normal(64, 96))
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    states = states_of(tmp_path / "x.f32", normal(SEQUENCES, LENGTH, 64))
    stream = stream_of(layer, angles, states, tmp_path)
    noise = normal(SEQUENCES, LENGTH, 64, seed=7)
    noisy = Stream(*(states_of(tmp_path / f"noisy {i}", torch.cat([*each.pieces()]) + noise) for i, each in
                     enumerate((stream.between, stream.after))))  # fmt: skip
    assert refit_layer(layer, angles, states, noisy, "all", HELD_OUT) == {}
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_refitted_model_is_nearer_to_its_source_layer_by_layer(tmp_path: Path) -> None:
    source = write_source("llama", tmp_path / "source")
    rows = {
        refit: convert_checkpoint(source, tmp_path / refit, some_tokens(64), replace(SMALL, refit=refit)).layers
        for refit in ("none", "attention", "all")
    }
    for none, attention, both in zip(*rows.values(), strict=True):
        assert none.stream_error >= attention.stream_error > 1.1 * both.stream_error > 0
    assert rows["none"][0].output_error == rows["all"][0].output_error


def test_a_single_sequence_leaves_nothing_to_fit_to_and_is_converted_all_the_same(tmp_path: Path) -> None:
    source = write_source("llama", tmp_path / "source")
    for refit in ("none", "all"):
        convert_checkpoint(source, tmp_path / refit, TOKENS[:1], replace(SMALL, refit=refit))
    found, expected = (load_model(tmp_path / refit).state_dict() for refit in ("all", "none"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_experts_and_methods_to_compare_with_keep_the_weights_that_are_copied(tmp_path: Path) -> None:
    experts = write_source("mixtral", tmp_path / "mixtral")
    convert_checkpoint(experts, tmp_path / "out", TOKENS, SMALL)
    plain = write_source("llama", tmp_path / "llama")
    options = ConvertOptions(rank=16, rope_dim=8, method="svd")
    assert options.refits == "none" and SMALL.refits == "all"
    convert_checkpoint(plain, tmp_path / "svd", TOKENS, options)
    for before, after in ((experts, tmp_path / "out"), (plain, tmp_path / "svd")):
        original, copy = (load_model(folder).state_dict() for folder in (before, after))
        compared = [name for name in copy if ".mlp." in name and "shared" not in name]
        assert compared
        for name in compared:
            assert torch.equal(copy[name], original[name]), name
