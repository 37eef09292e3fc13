"""Checkpoints: what is saved loads in transformers and here; MTP modules are kept, or left out where absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families_for_tests import CASES, VOCAB, randomise, save_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mistral4ForCausalLM
from transformers.modeling_layers import MtpModel

from latentkv.errors import CheckpointError
from latentkv.models.batch import Batch
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.forms import Form
from latentkv.models.loading import load_model, save_pretrained
from latentkv.state import PagedCache

IDS = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(3))
BY_NAME = {case.name: case for case in CASES}


def logits(decoder: Decoder, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return decoder.logits(decoder.forward_train(ids))


def with_mtp(tmp_path: Path, name: str = "v3") -> Decoder:
    """A random decoder with one MTP module, of a case's family; saved in `tmp_path`."""
    source = tmp_path / "source"
    save_checkpoint(BY_NAME[name], source)
    raw = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    decoder = Decoder(read_config(raw)).eval()
    randomise(decoder, seed=5)
    save_pretrained(decoder, tmp_path)
    return decoder


@pytest.mark.parametrize(
    "name",
    [
        *("v2-groups", "v3", "kimi-k2", "glm-flash", "minicpm3", "mistral4", "axk1", "youtu", "llama-gqa", "qwen3"),
        *(
            "mixtral",
            "granite",
            "phi3",
            "seed-oss",
            "olmoe",
            "qwen2-moe",
            "qwen3-moe",
            "dots1",
            "glm4-moe",
            "ling3",
            "kimi-linear",
        ),
    ],
)
def test_a_saved_checkpoint_gives_the_same_logits_in_transformers(name: str, tmp_path: Path) -> None:
    save_checkpoint(BY_NAME[name], tmp_path / "source")
    decoder = load_model(tmp_path / "source")
    save_pretrained(decoder, tmp_path / "saved")
    kind = Mistral4ForCausalLM if name == "mistral4" else AutoModelForCausalLM
    theirs = kind.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = theirs(IDS).logits
    ours = logits(load_model(tmp_path / "saved"))
    assert torch.equal(ours, logits(decoder))
    assert float((ours - expected).abs().max() / expected.abs().max()) <= 1e-4


@torch.inference_mode()
def paged_mtp(decoder: Decoder, cut: int, form: Form | None) -> torch.Tensor:
    """The module's hidden states by way of a cache, read in two steps."""
    cache = PagedCache(decoder.config.specs("fp32", mtp=torch.float32), 8, page_size=8)
    pages = [[3, 0, 5], [1, 7, 2]]

    def batch(first: int, last: int, kv_start: int = 0) -> Batch:
        return Batch.build(IDS[:, first:last].tolist(), [first] * 2, pages, page_size=8, kv_start=kv_start)

    last = IDS.shape[1] - 1
    states = decoder(batch(0, last), cache).unflatten(0, (2, last))
    hidden: list[torch.Tensor] = []
    for begin, end in ((1, cut), (cut, last + 1)):
        own = batch(begin, end, kv_start=1)
        inputs = decoder.mtp_inputs(states[:, begin - 1 : end - 1].flatten(0, 1), own)
        hidden.append(decoder.run_mtp(*inputs, own, cache, form=form).unflatten(0, (2, end - begin)))
    return torch.cat(hidden, dim=1)


@pytest.mark.parametrize("name", ["v3", "glm4-moe"])
def test_mtp_modules_give_the_hidden_states_of_transformers(name: str, tmp_path: Path) -> None:
    decoder = with_mtp(tmp_path, name)
    main = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    # transformers finds MTP tensors by this pattern, which it writes for the layers of published models only.
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{decoder.config.num_layers}\..*"]
    oracle = MtpModel.from_pretrained(main).eval()
    with torch.inference_mode():
        hidden = decoder.forward_train(IDS[:, :-1])
        ours = decoder.mtp_hidden(0, hidden, IDS[:, 1:])
        positions = torch.arange(1, IDS.shape[1])[None].expand(2, -1)
        theirs = oracle.forward_layer(
            0, main.model(IDS[:, :-1]).last_hidden_state, positions, None, input_ids=IDS[:, 1:]
        )
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-4
    for cut in (2, 9, 20):
        for form in ("absorbed", "expanded", None):
            paged = paged_mtp(decoder, cut, form)
            assert float((paged - theirs).abs().max() / theirs.abs().max()) <= 1e-4, (cut, form)


@pytest.mark.parametrize("name", ["v3", "ling3"])
def test_mtp_modules_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    decoder = with_mtp(tmp_path, name)
    again = load_model(tmp_path)
    assert len(again.mtp) == 1
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_an_mtp_module_of_ling_is_called_as_published(tmp_path: Path) -> None:
    with_mtp(tmp_path, "ling3")
    names = {name.removeprefix("model.layers.4.") for name in load_file(tmp_path / "model.safetensors")}
    assert {
        "enorm.weight",
        "hnorm.weight",
        "eh_proj.weight",
        "final_layernorm.weight",
        "attention.g_proj.weight",
    } <= names


def test_mtp_modules_that_the_config_counts_but_the_files_lack_are_left_out(tmp_path: Path) -> None:
    with_mtp(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if ".layers.3." not in n}, tmp_path / "model.safetensors")
    assert len(load_model(tmp_path).mtp) == 0


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    with_mtp(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.self_attn.kv_b_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.kv_b_proj\.weight"):
        load_model(tmp_path)


def test_weights_are_cast_on_load_but_the_routing_bias_is_not(tmp_path: Path) -> None:
    with_mtp(tmp_path)
    decoder = load_model(tmp_path, dtype=torch.bfloat16)
    assert decoder.dtype == torch.bfloat16
    assert {layer.gate.e_score_correction_bias.dtype for layer in decoder.moe_layers()} == {torch.float32}


def test_the_saved_config_names_the_stored_dtype(tmp_path: Path) -> None:
    decoder = with_mtp(tmp_path / "a").to(torch.bfloat16)
    save_pretrained(decoder, tmp_path / "b")
    saved = json.loads((tmp_path / "b" / "config.json").read_text())
    assert saved["dtype"] == "bfloat16"
    assert load_model(tmp_path / "b").dtype == torch.bfloat16


def test_the_text_model_of_a_wrapper_is_saved_as_a_model_of_its_own(tmp_path: Path) -> None:
    save_checkpoint(BY_NAME["v3"], tmp_path / "wrapped")
    path = tmp_path / "wrapped" / "config.json"
    path.write_text(json.dumps({"model_type": "kimi_k25", "text_config": json.loads(path.read_text())}))
    tensors = load_file(tmp_path / "wrapped" / "model.safetensors")
    renamed = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(renamed | {"vision_tower.x": torch.zeros(2)}, tmp_path / "wrapped" / "model.safetensors")
    decoder = load_model(tmp_path / "wrapped")
    save_pretrained(decoder, tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = theirs(IDS).logits
    assert float((logits(decoder) - expected).abs().max() / expected.abs().max()) <= 1e-4


def test_stop_ids_of_generation_config_are_saved_too(tmp_path: Path) -> None:
    save_checkpoint(BY_NAME["llama-gqa"], tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    save_pretrained(load_model(tmp_path / "source"), tmp_path / "saved")
    assert read_config(tmp_path / "saved").eos_token_ids == (2, 9)


def test_logits_of_a_bf16_model_are_exact_in_its_hidden_states(tmp_path: Path) -> None:
    save_checkpoint(BY_NAME["v3"], tmp_path)
    decoder = load_model(tmp_path, dtype=torch.bfloat16)
    hidden = torch.randn(5, decoder.config.hidden_size).bfloat16()
    with torch.inference_mode():
        got = decoder.logits(hidden)
    torch.testing.assert_close(got, hidden.float() @ decoder.output_weight.float().T, atol=1e-5, rtol=1e-5)
