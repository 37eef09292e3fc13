"""What ends a completion, and what token ids of files and requests must be, seen from `LLM`."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from latentkv import LLM, SamplingParams
from latentkv.cli.checkpoint_facts import read_facts
from latentkv.errors import ConfigError, RequestError, TokenizerError
from latentkv.text.bpe_trainer import train_bpe

VOCAB = 260  # 256 bytes and the special tokens
SPECIAL = ["<s>", "</s>", "<|im_end|>", "<|im_user|>"]
TEMPLATE = "{% for m in messages %}<|im_user|>{{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    train_bpe(["it was a dark night"], VOCAB, special_tokens=SPECIAL).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def settle(folder: Path, *, eos: object = 1, **tokenizer: object) -> Path:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **tokenizer}))
    return folder


def wanting(token: int, **params: object) -> SamplingParams:
    return SamplingParams(temperature=0, logit_bias={token: 100.0}, max_tokens=4, **params)


def test_what_closes_a_turn_in_the_template_ends_an_answer(folder: Path) -> None:
    llm = LLM(settle(folder, chat_template=TEMPLATE))
    answer = llm.chat([{"role": "user", "content": "hi"}], wanting(2))
    assert (answer.finish_reason, answer.token_ids) == ("stop", [2])
    assert llm.unnamed_turn_end == "<|im_end|>"
    ignored = llm.chat([{"role": "user", "content": "hi"}], wanting(2, ignore_eos=True))
    assert (ignored.finish_reason, len(ignored.token_ids)) == ("length", 4)
    facts = read_facts(folder).tokenizer
    assert facts is not None
    assert (facts.eos_ids, facts.turn_end_id) == ((1,), 2)


def test_a_turn_end_that_the_files_name_is_no_news(folder: Path) -> None:
    llm = LLM(settle(folder, eos=[1, 2], chat_template=TEMPLATE))
    assert llm.unnamed_turn_end is None
    assert llm.engine.eos_ids == {1, 2}
    assert LLM(settle(folder)).unnamed_turn_end is None  # no template, no turns


def test_minus_one_ends_nothing_and_masks_nothing(folder: Path) -> None:
    llm = LLM(settle(folder, eos=-1))
    for least in (0, 3):
        assert llm.generate([5, 6], wanting(VOCAB - 1, min_tokens=least))[0].token_ids == [VOCAB - 1] * 4


def test_an_end_outside_the_vocabulary_is_named_before_anything_runs(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id names the token 100000"):
        LLM(settle(folder, eos=100_000))
    with pytest.raises(TokenizerError, match=r"eos_token '<\|new\|>' has the id"):
        LLM(settle(folder, eos_token="<|new|>", pad_token="<|pad|>"))


def test_a_token_for_padding_past_the_embeddings_does_no_harm_until_it_is_asked_for(folder: Path) -> None:
    llm = LLM(settle(folder, pad_token="<|pad|>", unk_token="<|unk|>"))
    assert llm.tokenizer is not None
    assert llm.tokenizer.vocab_size > VOCAB
    llm.generate("it was", SamplingParams(max_tokens=2))
    with pytest.raises(RequestError, match="outside the vocabulary"):
        llm.generate(llm.tokenizer.encode("<|pad|><|unk|>", allow_special=True))
