"""A packed decoder computes what its unpacked one does: the weights only lie, and if asked are rounded, differently."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from families_for_tests import CASES, FIRST_CASES, KINDS, VOCAB, Case, by_family, slow_but
from safetensors.torch import load_file, save_file
from test_parity import reference
from torch import nn

from latentkv import kernels
from latentkv.checkpoint.names import published_name
from latentkv.errors import ConfigError
from latentkv.models.batch import Batch, SlotUse
from latentkv.models.decoder import Decoder
from latentkv.models.forms import Form
from latentkv.models.kda import EXACT
from latentkv.models.loading import load_model
from latentkv.models.packing import Packing, choose_packing
from latentkv.ops.backends import compact_is_fast
from latentkv.state import PagedCache
from latentkv.weights import PackedWeight, quantize_weight
from latentkv.weights.formats import INT4, INT8, INTEGER_PRODUCTS, ROUNDED_TO
from latentkv.weights.policy import choose_scheme

pytestmark = pytest.mark.skipif(kernels.extension is None, reason="the native kernels are not built")

PAGE = 16
QUANTISED = ["v2-groups", "v3", "v32", "glm5", "longcat", "hy4", "mistral4", "llama-gqa", "mixtral", "qwen2-moe"]
IDS = torch.randint(3, VOCAB, (45,), generator=torch.Generator().manual_seed(1)).tolist()
FOLDERS = TemporaryDirectory(prefix="latentkv-models-")  # removed when the process ends


@cache
def checkpoint(name: str) -> Path:
    """A checkpoint whose weights bfloat16 holds exactly, stored in float32."""
    folder = Path(shutil.copytree(reference(name)[0], Path(FOLDERS.name) / name))
    weights = {key: tensor.bfloat16().float() for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logits(decoder: Decoder) -> torch.Tensor:
    """Of IDS: a prompt in two pieces, then token by token."""
    cache = PagedCache(decoder.config.specs("fp32"), num_pages=4, page_size=PAGE, num_slots=1)
    pages, rows, done = cache.pool.allocate(4), [], 0
    with torch.inference_mode():
        for length in [20, 17, *[1] * 8]:
            slots = [SlotUse(slot=0, pending=0, committed=length)] if cache.num_slots else None
            batch = Batch.build([IDS[done : done + length]], [done], [pages], page_size=PAGE, slots=slots)
            rows.append(decoder.logits(decoder(batch, cache)))
            done += length
    return torch.cat(rows)


@cache
def unpacked_logits(name: str) -> torch.Tensor:
    """Of a case's checkpoint as it is."""
    return logits(load_model(checkpoint(name)))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert float((actual - expected).abs().max() / expected.abs().max()) <= tolerance


@by_family
def test_packing_changes_no_logits(case: Case) -> None:
    packed = load_model(checkpoint(case.name), packing=Packing())
    assert_close(logits(packed), unpacked_logits(case.name), 1e-4)


@pytest.mark.parametrize("case", slow_but(FIRST_CASES, KINDS), ids=lambda case: case.name)
def test_compact_weights_change_no_logits(case: Case) -> None:
    packed = load_model(checkpoint(case.name), packing=Packing(compact=True))
    assert_close(logits(packed), unpacked_logits(case.name), 1e-4)


@by_family
def test_nothing_large_is_left_unpacked(case: Case) -> None:
    decoder = load_model(checkpoint(case.name), packing=Packing())
    left = {name for name, parameter in decoder.named_parameters() if parameter.ndim > 1}
    # The embedding is looked up, not multiplied by; float32 routers and what else must be exact are kept as they are.
    routers = (
        "mlp.gate.weight",
        "shortcut.gate.weight",
        "mlp.shared_expert_gate.weight",
        "indexer.weights_proj.weight",
        "W_down.weight",
        "W_up.weight",
        "index_kpool_compress_ape",
        "_hc.fn",
        "hc_head.fn",
        *EXACT,
    )
    rest = {name for name in left if not name.endswith(routers)}
    assert rest == {"model.embed_tokens.weight", *(["lm_head.weight"] if decoder.config.exact_head else [])}


@pytest.mark.parametrize(
    ("name", "fmt"),
    [  # every run has a name with one of the formats
        pytest.param(name, fmt, marks=pytest.mark.slow if (i + j) % 2 else ())
        for i, name in enumerate(QUANTISED)
        for j, fmt in enumerate(["int8", "int4"])
    ],
)
def test_quantised_weights_give_the_logits_of_their_dequantised_values(name: str, fmt: str) -> None:
    folder = checkpoint(name)
    rounded = load_model(folder)
    with torch.no_grad():
        for key, parameter in rounded.named_parameters():
            if key == "model.embed_tokens.weight" or parameter.ndim < 2:
                continue
            scheme = choose_scheme(published_name(key, rounded.config.num_layers), parameter.shape, ROUNDED_TO[fmt])
            if scheme is not None:
                parameter.copy_(quantize_weight(parameter, scheme.format, scheme.group).dequantize())
    assert_close(logits(load_model(folder, packing=Packing(ROUNDED_TO[fmt]))), logits(rounded), 1e-3)


def test_a_tied_output_head_is_a_packed_copy_of_the_embedding() -> None:
    case = next(case for case in CASES if load_model(checkpoint(case.name)).config.tie_word_embeddings)
    decoder = load_model(checkpoint(case.name), packing=Packing(INT8))
    assert isinstance(decoder.output_weight, PackedWeight)
    assert decoder.output_weight.format == "int8"
    assert decoder.model.embed_tokens.weight.dtype == torch.float32


def test_whole_sequences_without_a_cache_run_packed_too() -> None:
    folder, ids = checkpoint("v3"), torch.tensor([IDS])
    packed, plain = load_model(folder, packing=Packing()), load_model(folder)
    with torch.inference_mode():
        assert_close(packed.logits(packed.forward_train(ids)), plain.logits(plain.forward_train(ids)), 1e-4)


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_a_packed_layer_runs_whole_sequences_in_both_forms(form: Form) -> None:
    folder = checkpoint("v3")
    x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        packed, plain = (
            load_model(folder, packing=packing).model.layers[1].self_attn(x, form=form) for packing in (Packing(), None)
        )
    assert_close(packed, plain, 1e-4)


def test_only_bfloat16_is_packed_unasked() -> None:
    cpu = torch.device("cpu")
    assert choose_packing(None, torch.bfloat16, cpu) == Packing(compact=compact_is_fast())
    assert choose_packing(None, torch.float32, cpu) is None
    assert choose_packing(None, torch.float16, cpu) is None
    assert choose_packing("int4", torch.float32, cpu) == Packing(INT4, compact=compact_is_fast())
    with kernels.use_backend("torch"):
        assert choose_packing(None, torch.bfloat16, cpu) is None


def test_int8_activations_are_for_quantised_weights_and_native_kernels() -> None:
    cpu = torch.device("cpu")
    assert choose_packing("int4", torch.bfloat16, cpu, "int8") == Packing(
        INT4, compact=compact_is_fast(), rounds_input=True
    )
    assert choose_packing("int4", torch.bfloat16, cpu, "exact") == choose_packing("int4", torch.bfloat16, cpu)
    with pytest.raises(ConfigError, match="activations='int4' is not supported: choose exact or int8"):
        choose_packing("int4", torch.bfloat16, cpu, "int4")
    with pytest.raises(ConfigError, match=r"add weights='int8' or weights='int4', or leave it out"):
        choose_packing(None, torch.float32, cpu, "int8")
    with kernels.use_backend("torch"), pytest.raises(ConfigError, match="unset LATENTKV_ISA"):
        choose_packing("int4", torch.bfloat16, cpu, "int8")


def test_all_quantised_weights_round_their_input_and_no_others() -> None:
    def packed(packing: Packing) -> dict[str, PackedWeight]:
        modules = load_model(checkpoint("v3"), packing=packing).named_modules()
        return {
            f"{name}.{leaf}": value
            for name, module in modules
            for leaf, value in vars(module).items()
            if isinstance(value, PackedWeight)
        }

    exact, rounding = packed(Packing(INT4)), packed(Packing(INT4, rounds_input=True))
    assert {weight.rounds_input for weight in exact.values()} == {False}
    assert {name: weight.rounds_input for name, weight in rounding.items()} == {
        name: weight.format in INTEGER_PRODUCTS for name, weight in exact.items()
    }
    assert any(weight.rounds_input for weight in rounding.values())


def test_quantised_weights_are_refused_where_nothing_can_compute_with_them() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match=r"weights='int3' is not supported: choose int8 or int4"):
        choose_packing("int3", torch.bfloat16, cpu)
    with pytest.raises(ConfigError, match="bf16 or fp32, not float16"):
        choose_packing("int8", torch.float16, cpu)
    with pytest.raises(ConfigError, match="run on a CPU only, not on cuda"):
        choose_packing("int8", torch.bfloat16, torch.device("cuda"))
    with kernels.use_backend("torch"), pytest.raises(ConfigError, match="unset LATENTKV_ISA"):
        choose_packing("int8", torch.bfloat16, cpu)


def test_packing_is_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a layer is read, the layers before it are packed already and those after it hold nothing yet."""
    seen: list[tuple[int, int]] = []

    def record(decoder: nn.Module) -> None:
        layers = list(decoder.model.layers)
        packed = sum(layer.self_attn.o_proj.packed is not None for layer in layers)
        empty = sum(layer.input_layernorm.weight.is_meta for layer in layers)
        seen.append((packed, empty))

    from latentkv.models import loading

    fill = loading.Match.fill
    decoders: list[Decoder] = []
    monkeypatch.setattr(loading, "Decoder", lambda *a, **k: decoders.append(Decoder(*a, **k)) or decoders[-1])
    monkeypatch.setattr(loading.Match, "fill", lambda self, state: (record(decoders[-1]), fill(self, state))[1])
    load_model(checkpoint("v3"), packing=Packing())
    assert seen[:4] == [(0, 3), (0, 2), (1, 1), (2, 0)]
