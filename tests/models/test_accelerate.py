"""An accelerated model of transformers gives what it gave before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families_for_tests import FIRST_CASES, build
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer

from latentkv.errors import ConfigError
from latentkv.transformers import accelerate, restore
from latentkv.transformers import attention as ours
from latentkv.transformers.cache_layer import LatentIndexedLayer, LatentLayer

CASES = {case.name: case for case in FIRST_CASES}
DENSE = ["v3", "v2-lite", "glm-flash", "minicpm3", "mistral4", "longcat", "axk1", "youtu", "kimi-linear", "ling3"]
NAMES = [*DENSE, "v32", "glm-dsa", "axk2"]
GENERATE: dict[str, Any] = {
    "max_new_tokens": 10,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def model_of(name: str) -> PreTrainedModel:
    return build(CASES[name]).eval().float()


def prompts(batch: int = 3, tokens: int = 21) -> dict[str, Tensor]:
    """Of different lengths, with padding on the left."""
    ids = torch.randint(3, 90, (batch, tokens))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : row * (tokens - 1) // (batch - 1)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def assert_alike(wanted: Any, got: Any) -> None:
    assert torch.equal(wanted.sequences, got.sequences)
    for theirs, own in zip(wanted.logits, got.logits, strict=True):
        torch.testing.assert_close(own, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("v3", "v32", "kimi-linear") else pytest.mark.slow) for name in NAMES],
)
def test_batches_with_padding_get_the_tokens_and_logits_of_the_model_as_it_was(name: str):
    model, inputs = model_of(name), prompts()
    wanted = model.generate(**inputs, **GENERATE)
    got = accelerate(model).generate(**inputs, **GENERATE)
    assert_alike(wanted, got)
    kinds = {type(layer) for layer in got.past_key_values.layers}
    assert kinds & {LatentLayer, LatentIndexedLayer} and DynamicLayer not in kinds


@pytest.mark.parametrize("name", ["v3", "v32"])
@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3, "output_logits": False},
        {"do_sample": True, "top_k": 20},
        {"prompt_lookup_num_tokens": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"use_cache": False},
    ],
    ids=lambda how: next(iter(how)),
)
def test_ways_to_generate_that_reorder_crop_or_leave_out_the_cache(name: str, how: dict[str, Any]):
    model, inputs = model_of(name), prompts()
    if "prompt_lookup_num_tokens" in how:
        inputs = {"input_ids": torch.tensor([[5, 6, 7, 8] * 6])}
    torch.manual_seed(1)
    wanted = model.generate(**inputs, **GENERATE | how)
    accelerate(model)
    torch.manual_seed(1)
    got = model.generate(**inputs, **GENERATE | how)
    assert torch.equal(wanted.sequences, got.sequences)


def test_a_cache_of_fixed_length_is_copied_from():
    model, inputs = model_of("v3"), prompts()
    wanted = model.generate(**inputs, **GENERATE)
    got = accelerate(model).generate(**inputs, **GENERATE, cache_implementation="static")
    assert isinstance(got.past_key_values, StaticCache)
    assert_alike(wanted, got)


def test_a_cache_goes_on_where_the_model_is_accelerated_and_restored_meanwhile():
    model = model_of("v3")
    ids = torch.randint(3, 90, (2, 30))
    wanted = model(ids).logits
    cache = DynamicCache(config=model.config)
    parts: list[Tensor] = []
    for change, begin, end in ((restore, 0, 9), (accelerate, 9, 10), (accelerate, 10, 21), (restore, 21, 30)):
        parts.append(change(model)(ids[:, begin:end], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["v3", "v32", "mistral4"])
@pytest.mark.parametrize("kind", ["right padding", "holes", "packed", "own mask"])
def test_masks_of_other_kinds(name: str, kind: str):
    model = model_of(name)
    ids = torch.randint(3, 90, (2, 12))
    given: dict[str, Any] = {"input_ids": ids}
    seen = torch.ones_like(ids)
    if kind == "right padding":
        seen[0, 8:] = 0
        given["attention_mask"] = seen
    elif kind == "holes":
        seen[1, 3:6] = 0
        given["attention_mask"] = seen
    elif kind == "packed":
        given["position_ids"] = torch.tensor([[*range(5), *range(7)]] * 2)
        given["use_cache"] = False
    else:
        unseen = torch.ones(12, 12, dtype=torch.bool).triu(1)
        unseen[9:, 2] = True
        given["attention_mask"] = torch.zeros(2, 1, 12, 12).masked_fill(unseen, torch.finfo(torch.float32).min)
    wanted = model(**given).logits
    got = accelerate(model)(**given).logits
    rows = seen.bool()
    torch.testing.assert_close(got[rows], wanted[rows], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["v3", "v32"])
def test_gradients_are_those_of_the_model_as_it_was(name: str):
    model, inputs = model_of(name).train(), prompts()
    # What padding predicts, the first token among it, is no one's concern.
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"].cumsum(1) < 2, -100)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        return {each: p.grad.clone() for each, p in model.named_parameters() if p.grad is not None}

    wanted = gradients()
    accelerate(model)
    for each, gradient in gradients().items():
        torch.testing.assert_close(gradient, wanted[each], atol=1e-5, rtol=1e-4)


def test_a_context_in_several_chunks_is_that_in_one(monkeypatch: pytest.MonkeyPatch):
    model, inputs = model_of("v2-lite"), prompts(tokens=40)
    with torch.no_grad():
        wanted = accelerate(model)(**inputs).logits
        monkeypatch.setattr(ours, "_EXPANDED_AT_ONCE", 7)
        got = model(**inputs).logits
    rows = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[rows], wanted[rows], atol=2e-5, rtol=1e-5)


def test_a_token_is_written_beside_the_others_which_stay_where_they_are():
    layer = LatentLayer()

    def tokens(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(2, 1, count, 20), torch.randn(2, 1, count, 8)

    latents, _ = layer.update(*tokens(60))
    first = latents.data_ptr()
    assert layer.update(*tokens(4))[0].data_ptr() == first
    grown = layer.update(*tokens(1))[0].data_ptr()
    assert grown != first and layer.get_seq_length() == 65
    assert all(layer.update(*tokens(1))[0].data_ptr() == grown for _ in range(30))


def test_bf16_is_as_near_to_the_truth_as_before():
    model, inputs = model_of("v3"), prompts(tokens=60)
    with torch.no_grad():
        half = model.bfloat16()
        truth = copy.deepcopy(half).float()(**inputs).logits
        before = half(**inputs).logits
        after = accelerate(half)(**inputs).logits
    rows = inputs["attention_mask"].bool()
    errors = [(logits.double() - truth)[rows].square().mean() for logits in (before, after)]
    assert errors[1] < 1.5 * errors[0]


def test_it_can_be_undone_and_done_twice():
    model = model_of("v3")
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    before = model.config._attn_implementation
    assert accelerate(accelerate(model)) is model and model.config._attn_implementation == ours.NAME
    assert restore(restore(model)) is model and model.config._attn_implementation == before
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


def _with_adapter(model: PreTrainedModel) -> None:
    attention = model.get_decoder().layers[0].self_attn
    attention.kv_b_proj = nn.Sequential(attention.kv_b_proj)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("llama-gqa", lambda _: None, "llama has no layer with latent attention"),
        ("hy4", lambda _: None, "sinks, which accelerate does not compute: run it by latentkv.LLM"),
        ("glm5", lambda _: None, "indexer, which accelerate does not compute"),
        ("v3", _with_adapter, "a kv_b_proj that is a Sequential"),
        ("v3", lambda model: model.to("meta"), "is on meta"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name_and_nothing_is_changed(
    name: str, change: Callable[[PreTrainedModel], Any], expected: str
):
    model = model_of(name)
    change(model)
    before = model.config._attn_implementation
    with pytest.raises(ConfigError, match=expected):
        accelerate(model)
    assert model.config._attn_implementation == before
