from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig

from latentkv import LLM, SamplingParams, llm_loading, llm_options
from latentkv.engine.drafts import NGramDrafter
from latentkv.engine.mtp import MTPDrafter
from latentkv.errors import CacheError, CheckpointError, ConfigError, RequestError, TokenizerError
from latentkv.kernels import has_int8_products, use_backend
from latentkv.llm import Completion, Piece
from latentkv.models.decoder import Decoder
from latentkv.ops.backends import why_not_native
from latentkv.quantize import quantize_checkpoint
from latentkv.text.bpe_trainer import train_bpe

VOCAB, CONTEXT = 320, 192
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, seed=0)
TEXT = "In 1851 there were 2 whales — naïve 🐋 whales, and then “none”. " * 4
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|assistant|>"


def write_tokenizer(folder: Path, *, template: str | None = None, more_tokens: int = 0) -> None:
    specials = ["<s>", "</s>", "<|user|>", "<|assistant|>", *(f"<{i}>" for i in range(more_tokens))]
    train_bpe([TEXT, "the whale swam on and on"], VOCAB + more_tokens, special_tokens=specials).save(
        str(folder / "tokenizer.json")
    )
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    if template:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of latent and one of grouped-query attention, written by transformers."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    for kind, config in {
        "mla": DeepseekV3Config(**SHAPE, **MLA),
        "gqa": LlamaConfig(**SHAPE, num_key_value_heads=2),
    }.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(root / kind)
        write_tokenizer(root / kind)
    return {kind: root / kind for kind in ("mla", "gqa")}


@pytest.fixture(scope="session", params=["mla", "gqa"])
def model(request: pytest.FixtureRequest, folders: dict[str, Path]) -> LLM:
    return LLM(folders[request.param])


@pytest.fixture
def mla(folders: dict[str, Path]) -> LLM:
    return LLM(folders["mla"])


@pytest.fixture(autouse=True)
def no_page_is_lost(request: pytest.FixtureRequest):
    models = [request.getfixturevalue(name) for name in ("model", "mla") if name in request.fixturenames]
    yield
    for model in models:
        model.cache.check()
        assert model.cache.pool.free_pages == model.cache.num_pages


def speak(model: LLM, monkeypatch: pytest.MonkeyPatch, text: str) -> list[int]:
    """Make the model write `text` (then </s>), whatever its weights; returns the tokens."""
    assert model.tokenizer is not None
    script = [*model.tokenizer.encode(text, add_bos=False), 1]
    said = iter(script)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        result = torch.zeros(*hidden.shape[:-1], VOCAB)
        result[..., next(said)] = 1e3
        return result

    monkeypatch.setattr(model.decoder, "logits", logits)
    return script


# Tokens


def test_greedy_equals_a_loop_over_logits_of_the_growing_sequence_and_transformers(model: LLM):
    prompt = [0, 7, 300, 41, 5]
    tokens = list(prompt)
    for _ in range(12):
        tokens.append(int(model.logits(tokens)[-1].argmax()))
    assert model.generate(prompt, GREEDY)[0].token_ids == tokens[5:]
    theirs = AutoModelForCausalLM.from_pretrained(model.folder).eval()
    expected = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert tokens == expected[0].tolist()


def test_many_prompts_give_what_each_gives_alone_in_order(model: LLM):
    prompts = ["the whale", [0, 9, 8, 7], "In 1851"]
    params = [SamplingParams(max_tokens=9, seed=4), GREEDY, SamplingParams(max_tokens=14, seed=4, ignore_eos=True)]
    alone = [model.generate(p, s)[0] for p, s in zip(prompts, params, strict=True)]
    assert model.generate(prompts, params) == alone
    assert len(model.generate(prompts)) == 3


def test_same_seed_same_text_and_a_fresh_seed_is_reported(model: LLM):
    first = model.generate("the whale", SamplingParams(max_tokens=20))[0]
    again = model.generate(["swam", "the whale"], SamplingParams(max_tokens=20, seed=first.seed))[1]
    assert again == first
    assert model.generate("the whale", SamplingParams(max_tokens=20))[0].token_ids != first.token_ids


def test_logprobs_are_those_of_the_models_own_logits(model: LLM):
    params = SamplingParams(max_tokens=6, logprobs=3, temperature=0.5, top_k=5, repetition_penalty=1.5, ignore_eos=True)
    done = model.generate("the whale", params)[0]
    assert done.logprobs is not None
    assert [entry.token_id for entry in done.logprobs] == done.token_ids
    expected = model.logits(done.prompt_token_ids + done.token_ids).log_softmax(-1)
    for position, entry in enumerate(done.logprobs, start=len(done.prompt_token_ids) - 1):
        assert entry.logprob == pytest.approx(float(expected[position, entry.token_id]), abs=1e-4)
        assert list(entry.top) == expected[position].topk(3).indices.tolist()
    assert model.generate("the whale", GREEDY)[0].logprobs is None


# Text


def test_a_stream_joins_to_the_completion(model: LLM):
    params = SamplingParams(max_tokens=40, seed=11, temperature=2, logprobs=1)
    whole = model.generate("the whale", params)[0]
    parts = list(model.stream("the whale", params))
    assert "".join(part.text for part in parts) == whole.text
    assert [token for part in parts for token in part.token_ids] == whole.token_ids
    assert [entry for part in parts for entry in part.logprobs or []] == whole.logprobs
    assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [whole.finish_reason]


def test_a_stream_never_shows_half_a_character(mla: LLM, monkeypatch: pytest.MonkeyPatch):
    text = "a 鲸🐋 é—x"
    script = speak(mla, monkeypatch, text)
    parts = list(mla.stream("the", SamplingParams(max_tokens=99)))
    assert "".join(part.text for part in parts) == text
    assert all("\ufffd" not in part.text for part in parts)
    assert len(parts) == len(script) > len(text)
    assert parts[-1].finish_reason == "stop"


@pytest.mark.parametrize("stop", ["whale", "the whale", ["nothing", "🐋", "whale"], " wha"])
def test_text_ends_before_a_stop_string(mla: LLM, monkeypatch: pytest.MonkeyPatch, stop):
    text = "see the wheel, the whale and 🐋"
    first = min(text.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in text)
    speak(mla, monkeypatch, text)
    shown = ""
    for part in mla.stream("x", SamplingParams(max_tokens=99, stop=stop)):
        shown += part.text
        assert text[:first].startswith(shown)
        last = part
    assert (shown, last.finish_reason) == (text[:first], "stop")


def test_text_that_only_might_have_become_a_stop_string_is_shown_in_the_end(mla: LLM, monkeypatch: pytest.MonkeyPatch):
    speak(mla, monkeypatch, "the wha")
    done = mla.generate("x", SamplingParams(stop="whale"))[0]
    assert (done.text, done.finish_reason) == ("the wha", "stop")


def test_end_tokens_are_reported_but_are_no_text(mla: LLM, monkeypatch: pytest.MonkeyPatch):
    script = speak(mla, monkeypatch, "the whale")
    done = mla.generate("x")[0]
    assert (done.text, done.token_ids, done.finish_reason) == ("the whale", script, "stop")
    speak(mla, monkeypatch, "the whale")
    ended = mla.generate("x", SamplingParams(stop_token_ids=[script[1]]))[0]
    assert ended.token_ids == script[:2]
    assert mla.tokenizer is not None
    assert ended.text == mla.tokenizer.decode(script[:1])
    speak(mla, monkeypatch, "the whale")
    assert mla.generate("x", SamplingParams(max_tokens=2))[0].finish_reason == "length"


def test_prompts_begin_with_bos_as_the_checkpoint_says(model: LLM):
    assert model.tokenizer is not None
    ids = model.tokenizer.encode("the whale", add_bos=False)
    assert model.generate("the whale", GREEDY)[0].prompt_token_ids == [0, *ids]


def test_special_tokens_in_a_prompt_are_plain_text_but_those_of_a_chat_template_are_not(
    folders: dict[str, Path], tmp_path: Path
):
    folder = copytree(folders["mla"], tmp_path / "chat")
    write_tokenizer(folder, template=TEMPLATE)
    model = LLM(folder)
    assert 2 not in model.generate("<|user|>", GREEDY)[0].prompt_token_ids
    done = model.chat([{"role": "user", "content": "the whale"}], GREEDY)
    assert done.prompt_token_ids[:2] == [0, 2]
    assert done.prompt_token_ids[-1] == 3
    assert "".join(p.text for p in model.stream_chat([{"role": "user", "content": "the whale"}], GREEDY)) == done.text


def test_a_chat_without_a_template_ends_where_the_user_would_speak(mla: LLM, monkeypatch: pytest.MonkeyPatch):
    speak(mla, monkeypatch, " the whale\n\nUser: on")
    done = mla.chat([{"role": "user", "content": "swam"}])
    assert (done.text, done.finish_reason) == (" the whale", "stop")


# The cache


def test_pages_return_from_streams_that_are_dropped_closed_or_broken(mla: LLM, monkeypatch: pytest.MonkeyPatch):
    free = mla.cache.pool.free_pages
    stream = mla.stream("the whale", SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    assert mla.cache.pool.free_pages < free
    del stream
    assert mla.cache.pool.free_pages == free
    for _ in mla.stream("the whale", GREEDY):
        break
    mla.stream("never started")
    assert mla.cache.pool.free_pages == free
    speak(mla, monkeypatch, "the")
    with pytest.raises(RuntimeError):  # the script has run out
        mla.generate("x", SamplingParams(max_tokens=50, ignore_eos=True))


@pytest.mark.skipif(why_not_native(torch.device("cpu")) is not None, reason="the native kernels do not run here")
def test_quantised_weights_beside_float16_run_in_bfloat16_and_a_warning_says_so(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    quantize_checkpoint(folders["mla"], tmp_path / "copy", "int4", 32)
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    assert LLM(tmp_path / "copy").decoder.dtype == torch.bfloat16
    assert "names float16" in caplog.text and "--dtype fp16" in caplog.text
    caplog.clear()
    assert LLM(tmp_path / "copy", dtype="fp16").decoder.dtype == torch.float16
    copytree(folders["mla"], tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    assert LLM(tmp_path / "plain").decoder.dtype == torch.float16
    assert not caplog.text


def test_the_cache_is_sized_by_context_or_bytes_and_stored_as_asked(folders: dict[str, Path]):
    model = LLM(folders["mla"])
    assert model.cache.bytes_per_token == 2 * (16 + 8) * 4
    assert model.cache.allocated_bytes == CONTEXT * model.cache.bytes_per_token
    assert LLM(folders["mla"], max_context=65).cache.num_pages == 2
    half = LLM(folders["mla"], dtype="bf16")
    assert (half.cache.format, half.cache.bytes_per_token) == ("bf16", 2 * (16 + 8) * 2)
    assert half.logits([1, 2]).dtype == torch.float32
    sized = LLM(folders["gqa"], kv_dtype="bf16", kv_cache_bytes=100_000)
    assert sized.cache.num_pages == 100_000 // (64 * sized.cache.bytes_per_token)


@pytest.mark.parametrize(("kv_dtype", "bound"), [("bf16", 0.02), ("fp16", 0.01), ("int8", 0.05), ("fp8", 0.2)])
def test_a_smaller_cache_gives_almost_the_same_logits(folders: dict[str, Path], kv_dtype: Any, bound: float):
    tokens = list(range(3, 90))
    exact = LLM(folders["mla"]).logits(tokens)
    rounded = LLM(folders["mla"], kv_dtype=kv_dtype).logits(tokens)
    difference = float((rounded - exact).norm() / exact.norm())
    assert 0 < difference < bound


@pytest.mark.skipif(not has_int8_products(), reason="this CPU has no AVX-512 VNNI kernels")
def test_int8_products_decode_almost_the_same_and_only_where_asked_for(folders: dict[str, Path]):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)
    prompt = list(range(3, 90))
    scores: list[list[float]] = []
    for chosen in ({}, {"int8_products": True}):
        model = LLM(folders["mla"], kv_dtype="int8", **chosen)
        done = model.generate(prompt, replace(params, max_tokens=2))[0]
        scores.append([score.logprob for score in done.logprobs or ()])
    assert scores[0][0] == scores[1][0]  # of the prompt, which is read without
    assert scores[0][1] != scores[1][1]
    assert scores[0][1] == pytest.approx(scores[1][1], abs=0.05)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mla", {}, "it takes kv_dtype='int8', not 'auto'"),
        ("gqa", {"kv_dtype": "int8"}, "the model has no latent attention"),
    ],
)
def test_int8_products_that_cannot_be_had_are_refused(folders: dict[str, Path], name: str, options: Any, message: str):
    with pytest.raises(ConfigError, match=f"int8_products cannot be had: {message}"):
        LLM(folders[name], int8_products=True, **options)


def test_kernels_without_int8_products_are_named(folders: dict[str, Path]):
    with (
        use_backend("torch"),
        pytest.raises(ConfigError, match=r"the native kernels (are switched off|were not built)"),
    ):
        LLM(folders["mla"], kv_dtype="int8", int8_products=True)


def test_int8_activations_give_almost_the_same_logits_also_from_mapped_weights(
    folders: dict[str, Path], tmp_path: Path
):
    tokens = list(range(3, 90))
    options: dict[str, Any] = {"weights": "int8", "dtype": "bf16"}
    exact = LLM(folders["mla"], **options).logits(tokens)
    rounded = LLM(folders["mla"], **options, activations="int8").logits(tokens)
    differences = (rounded - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert 0 < float(differences.median()) < 0.05  # where a router is undecided, single tokens differ by more
    for _ in range(2):  # written and mapped
        mapped = LLM(folders["mla"], **options, activations="int8", packed_dir=tmp_path)
        assert torch.equal(mapped.logits(tokens), rounded)
    again = LLM(folders["mla"], **options, packed_dir=tmp_path)
    assert torch.equal(again.logits(tokens), exact)
    assert len(list(tmp_path.glob("*"))) == 1  # the same file serves both


def test_int8_activations_that_would_meet_no_quantised_weight_are_refused(folders: dict[str, Path]):
    with pytest.raises(ConfigError, match=r"add weights='int8' or weights='int4', or leave it out"):
        LLM(folders["mla"], dtype="bf16", activations="int8")


def test_a_request_may_use_the_whole_context(model: LLM):
    done = model.generate([5] * 100, SamplingParams(max_tokens=10_000, ignore_eos=True))[0]
    assert (len(done.token_ids), done.finish_reason) == (CONTEXT - 100, "length")
    assert model.logits([5] * CONTEXT).shape == (CONTEXT, VOCAB)


# Scores


@pytest.mark.parametrize("max_context", [16, 33, CONTEXT])
def test_perplexity_equals_the_full_computation(folders: dict[str, Path], max_context: int):
    model = LLM(folders["mla"], max_context=max_context)
    assert model.tokenizer is not None
    ids = [0, *model.tokenizer.encode(TEXT, add_bos=False)]
    nats, stride = 0.0, max_context // 2
    for i in range(1, len(ids)):
        start = max(0, math.ceil((i + 1 - max_context) / stride)) * stride
        nats -= float(model.logits(ids[start:i])[-1].double().log_softmax(-1)[ids[i]])
    score = model.perplexity(TEXT)
    assert (score.tokens, score.bytes) == (len(ids) - 1, len(TEXT.encode()))
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-4)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5)


# What is refused


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        (["the", ""], "prompt is empty"),
        ([[1], []], "prompt is empty"),
        ([VOCAB], "outside the vocabulary of 0 to 319"),
        ([1, -5], "outside the vocabulary"),
        ([1, 2.5], "a token id is an integer"),
        ([None], "a string or a list of token ids, not NoneType"),
        (None, "a string or a list of token ids, not NoneType"),
        (b"the", "a string or a list of token ids, not bytes"),
        (["the", 5], "a string or a list of token ids, not int"),
        ([5] * CONTEXT, "context of 192 holds a prompt of at most 191"),
        ("the whale " * 200, "context of 192 holds"),
    ],
)
def test_bad_prompts_are_refused(mla: LLM, prompt: Any, message: str):
    with pytest.raises(RequestError, match=message):
        mla.generate(prompt)


def test_bad_requests_are_refused_before_anything_runs(mla: LLM):
    with pytest.raises(RequestError, match="2 prompts came with 3 sampling_params"):
        mla.generate(["the", "whale"], [GREEDY] * 3)
    for wrong in ({"max_tokens": 3}, [{"max_tokens": 3}], 3):
        with pytest.raises(RequestError, match="sampling_params must be"):
            mla.generate("the", wrong)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="sampling_params must be"):
            mla.chat([{"role": "user", "content": "hi"}], wrong)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="stop_token_ids"):
        mla.stream("the", SamplingParams(stop_token_ids=[VOCAB]))
    for tokens in ([], [VOCAB], [1] * (CONTEXT + 1)):
        with pytest.raises(RequestError):
            mla.logits(tokens)
    for text in ("", None, ["the"]):
        with pytest.raises(RequestError, match="at least one character"):
            mla.perplexity(text)  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match="at least one message"):
        mla.chat([])


def test_a_prompt_that_never_fits_into_the_cache_says_the_limit(folders: dict[str, Path]):
    model = LLM(folders["mla"], kv_cache_bytes=64 * 2 * 24 * 4)
    with pytest.raises(RequestError, match=r"more than the 64 tokens that the cache holds.*kv_cache_bytes"):
        model.generate([1] * 60, SamplingParams(max_tokens=5))
    assert len(model.generate([1] * 60, SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "tpu"}, ConfigError, "device='tpu' cannot be used"),
        ({"device": "meta"}, ConfigError, "device='meta' is not supported"),
        ({"dtype": "int4"}, ConfigError, "dtype='int4' is not supported: choose fp32, bf16 or fp16"),
        ({"dtype": torch.int8}, ConfigError, "dtype=torch.int8 is not supported"),
        ({"kv_dtype": "fp4"}, ConfigError, "kv_dtype='fp4' is not supported: choose auto, fp32"),
        ({"max_context": 1}, ConfigError, "max_context=1 is not allowed"),
        ({"max_context": 193}, ConfigError, "max_context=193 is not allowed: this model takes 2 to 192 tokens"),
        ({"max_context": True}, ConfigError, "max_context=True"),
        ({"kv_cache_bytes": 5}, CacheError, "less than one page"),
    ],
)
def test_bad_options_are_refused(folders: dict[str, Path], options: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        LLM(folders["mla"], **options)


def test_quantised_caches_are_for_latents(folders: dict[str, Path]):
    with pytest.raises(CacheError, match="key/value cache cannot be stored as int8"):
        LLM(folders["gqa"], kv_dtype="int8")


def test_a_folder_without_a_tokenizer_serves_token_ids(folders: dict[str, Path], tmp_path: Path):
    folder = copytree(folders["gqa"], tmp_path / "mute")
    (folder / "tokenizer.json").unlink()
    model = LLM(folder)
    done = model.generate([0, 5, 6], GREEDY)[0]
    assert done.text == ""
    assert done.token_ids == LLM(folders["gqa"]).generate([0, 5, 6], GREEDY)[0].token_ids
    assert [token for piece in model.stream([0, 5, 6], GREEDY) for token in piece.token_ids] == done.token_ids
    for call in (
        lambda: model.generate("the"),
        lambda: model.generate([1], SamplingParams(stop="x")),
        lambda: model.chat([{"role": "user", "content": "hi"}]),
        lambda: model.perplexity("the"),
    ):
        with pytest.raises(RequestError, match=r"needs a tokenizer, and .* has none: give token ids"):
            call()


def test_a_tokenizer_of_another_model_is_refused(folders: dict[str, Path], tmp_path: Path):
    folder = copytree(folders["gqa"], tmp_path / "other")
    write_tokenizer(folder, more_tokens=100)
    with pytest.raises(TokenizerError, match="does not match the model"):
        LLM(folder)


def test_models_that_are_not_there_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        LLM(tmp_path)
    monkeypatch.setattr(llm_options, "EMBEDDED_MODEL", tmp_path / "nothing")
    with pytest.raises(ConfigError, match="no embedded model: name a model folder"):
        LLM()


def test_no_model_named_is_the_embedded_one(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llm_options, "EMBEDDED_MODEL", folders["mla"])
    assert LLM().folder == folders["mla"]


def test_weights_that_are_not_finite_are_an_error_not_a_text(mla: LLM):
    weight = mla.decoder.model.norm.weight
    with torch.no_grad():
        weight[0] = float("inf")
    with pytest.raises(CheckpointError, match="not finite"):
        mla.generate("the whale")


# The public face


def test_importing_the_package_loads_no_torch():
    code = "import sys, latentkv; dir(latentkv); sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_the_public_names_are_there_and_others_are_not():
    import latentkv

    for name in latentkv.__all__:
        assert getattr(latentkv, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        latentkv.nothing  # noqa: B018


def test_what_comes_out_is_plain_data():
    assert Completion("a", [1], None, "stop", [2], 3) == Completion("a", [1], None, "stop", [2], 3)
    assert Piece("a", [1]).finish_reason is None


# A real model

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
)


@pytest.fixture(scope="module")
def stories() -> LLM:
    data = Path(os.environ.get("LATENTKV_DATA", Path(__file__).parents[1] / "../shared/data"))
    if not (data / "stories260K" / "model.safetensors").is_file():
        pytest.skip(f"no stories260K in {data} (set LATENTKV_DATA)")
    return LLM(data / "stories260K")


def test_a_pretrained_model_writes_its_published_story(stories: LLM):
    done = stories.generate([1], SamplingParams(temperature=0, max_tokens=110))[0]
    assert done.text.startswith(STORY)
    streamed = "".join(piece.text for piece in stories.stream([1], SamplingParams(temperature=0, max_tokens=110)))
    assert streamed == done.text


def test_a_pretrained_model_goes_on_from_words_and_stops_where_told(stories: LLM):
    start, rest = STORY[:53], STORY[53:]
    done = stories.generate(start, SamplingParams(temperature=0, max_tokens=99, stop="One day"))[0]
    assert done.text == rest[: rest.index("One day")]
    assert done.finish_reason == "stop"


def test_a_pretrained_model_finds_its_own_story_likely(stories: LLM):
    likely, unlikely = stories.perplexity(STORY), stories.perplexity(STORY[::-1])
    assert likely.perplexity < 1.5 < 50 < unlikely.perplexity


@pytest.mark.parametrize(
    ("draft", "drafters", "layers"),
    [("auto", [NGramDrafter], 6), ("ngram", [NGramDrafter], 6), ("mtp", [MTPDrafter], 7)],
)
def test_the_draft_that_is_asked_for_is_used_and_its_cache_counted(draft: str, drafters: list, layers: int) -> None:
    own = LLM(speculate=2, draft=draft, kv_cache_bytes=2**20)
    sources = own.engine._drafter._sources  # pyright: ignore[reportPrivateUsage]
    assert [type(source.drafter) for source in sources] == drafters
    assert own.cache.bytes_per_token == layers * 128
    assert own.cache.allocated_bytes <= 2**20


def test_auto_takes_the_module_of_a_model_of_many_layers_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_options, "_LAYERS_OF_AUTO_MTP", 6)
    sources = LLM(speculate=2, kv_cache_bytes=2**20).engine._drafter._sources  # pyright: ignore
    assert [type(source.drafter) for source in sources] == [NGramDrafter, MTPDrafter]


def test_without_drafts_the_module_has_no_cache() -> None:
    assert LLM(draft="mtp", kv_cache_bytes=2**20).cache.bytes_per_token == 6 * 128


def test_drafts_that_cannot_be_had_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="draft='eagle' is not supported: choose auto, ngram, mtp"):
        LLM(draft="eagle")
    load = llm_loading.load_model

    def without_mtp(*args, **kwargs) -> Decoder:
        decoder = load(*args, **kwargs)
        decoder.drop_mtp_modules(keep=())
        return decoder

    monkeypatch.setattr(llm_loading, "load_model", without_mtp)
    with pytest.raises(ConfigError, match="draft='mtp' needs a multi-token-prediction module"):
        LLM(speculate=2, draft="mtp")
    assert LLM(speculate=2, kv_cache_bytes=2**20).cache.bytes_per_token == 6 * 128
