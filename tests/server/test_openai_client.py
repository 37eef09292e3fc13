"""The real `openai` client against a live server: what it gets is what the library gives for the same seed."""

from __future__ import annotations

import openai
import pytest

from latentkv import LLM, SamplingParams
from live_server import NAME, Live

PROMPT = "It was a dark night, and the old captain"
MESSAGES = [{"role": "user", "content": "Tell me of the sea."}]


def test_models_are_listed_and_found_by_name(client: openai.OpenAI, live: Live) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == (NAME, "model")
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="no model 'other' here"):
        client.models.retrieve("other")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_completion_is_the_librarys(client: openai.OpenAI, reference: LLM, temperature: float) -> None:
    got = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=24, temperature=temperature, seed=5)
    (expected,) = reference.generate(PROMPT, SamplingParams(max_tokens=24, temperature=temperature, seed=5))
    assert got.choices[0].text == expected.text
    assert got.choices[0].finish_reason == expected.finish_reason
    assert got.usage is not None
    assert got.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert got.usage.completion_tokens == len(expected.token_ids)
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens


def test_prompts_may_be_texts_or_token_ids_and_several(client: openai.OpenAI, reference: LLM) -> None:
    ids = reference.request(PROMPT).prompt_token_ids
    alone = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=8, temperature=0).choices[0].text
    of_ids = client.completions.create(model=NAME, prompt=list(ids), max_tokens=8, temperature=0)
    assert of_ids.choices[0].text == alone
    several = client.completions.create(model=NAME, prompt=["The whale", PROMPT], max_tokens=8, temperature=0)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[1].text == alone
    lists = client.completions.create(model=NAME, prompt=[list(ids), list(ids)], max_tokens=8, temperature=0)
    assert [choice.text for choice in lists.choices] == [alone, alone]


def test_a_streamed_completion_joins_to_the_whole_one_and_counts_its_tokens(client: openai.OpenAI) -> None:
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 30, "temperature": 1.0, "seed": 9}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert len(chunks) > 5
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == [whole.choices[0].finish_reason]
    assert [chunk.usage for chunk in chunks if chunk.usage] == [whole.usage]
    assert not chunks[-1].choices
    assert len({chunk.id for chunk in chunks}) == 1


def test_n_completions_differ_by_their_seeds_and_share_the_prompt(client: openai.OpenAI, reference: LLM) -> None:
    got = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=12, temperature=1, seed=3, n=3)
    expected = [reference.generate(PROMPT, SamplingParams(max_tokens=12, seed=3 + i))[0].text for i in range(3)]
    assert [choice.text for choice in got.choices] == expected
    assert len(set(expected)) == 3
    assert got.usage is not None
    assert got.usage.prompt_tokens == len(reference.request(PROMPT).prompt_token_ids)
    chunks = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=12, seed=3, n=3, stream=True)
    streamed = ["", "", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == expected


def test_best_of_returns_the_likeliest_a_token(client: openai.OpenAI) -> None:
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 10, "seed": 7}
    every = client.completions.create(**asked, n=4, logprobs=0).choices
    means = [sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in every]
    best = client.completions.create(**asked, best_of=4).choices
    assert [choice.text for choice in best] == [every[means.index(max(means))].text]
    assert best[0].logprobs is None


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    free = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=40, temperature=0).choices[0].text
    stop = free[10:14]
    got = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop, "\x00"])
    assert got.choices[0].text == free[: free.index(stop)]
    assert got.choices[0].finish_reason == "stop"


def test_completion_logprobs_are_of_the_chosen_and_the_likeliest_tokens(client: openai.OpenAI) -> None:
    got = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=6, temperature=0, logprobs=3).choices[0]
    assert got.logprobs is not None
    assert "".join(got.logprobs.tokens) == got.text
    for token, logprob, top in zip(
        got.logprobs.tokens, got.logprobs.token_logprobs, got.logprobs.top_logprobs, strict=True
    ):
        assert len(top) == 3
        assert top[token] == logprob == max(top.values())


def test_echo_with_logprobs_scores_the_prompt_as_reading_it_does(client: openai.OpenAI, reference: LLM) -> None:
    ids = list(reference.request(PROMPT).prompt_token_ids)
    got = client.completions.create(model=NAME, prompt=ids, max_tokens=0, echo=True, logprobs=1)
    logprobs = got.choices[0].logprobs
    assert logprobs is not None
    assert got.usage is not None and got.usage.completion_tokens == 0
    assert len(logprobs.tokens) == len(ids)
    assert logprobs.token_logprobs[0] is None
    expected = reference.logits(ids).log_softmax(-1)[:-1].gather(1, _column(ids[1:]))[:, 0].tolist()
    assert logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert got.choices[0].text == reference.tokenizer.decode(ids, skip_special=False)
    with_text = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=4, echo=True, temperature=0)
    plain = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=4, temperature=0)
    assert with_text.choices[0].text == PROMPT + plain.choices[0].text


def test_bias_penalties_and_min_tokens_do_what_the_library_does(client: openai.OpenAI, reference: LLM) -> None:
    given = {"presence_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": {"300": 4.0, "7": -100}}
    got = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=20, temperature=0, **given)
    params = SamplingParams(max_tokens=20, temperature=0, **{**given, "logit_bias": {300: 4.0, 7: -100}})
    assert got.choices[0].text == reference.generate(PROMPT, params)[0].text
    free = reference.generate(PROMPT, SamplingParams(max_tokens=20, temperature=0))[0]
    assert got.choices[0].text != free.text
    ends = {"min_tokens": 5, "stop_token_ids": [free.token_ids[2], free.token_ids[7]]}
    ended = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=20, temperature=0, extra_body=ends)
    expected = reference.generate(PROMPT, SamplingParams(max_tokens=20, temperature=0, **ends))[0]
    assert ended.choices[0].text == expected.text
    assert ended.usage is not None and ended.usage.completion_tokens >= 5


def test_a_chat_answer_is_the_librarys(client: openai.OpenAI, reference: LLM) -> None:
    got = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=20, temperature=0)
    expected = reference.chat(MESSAGES, SamplingParams(max_tokens=20, temperature=0))
    (choice,) = got.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert got.usage is not None and got.usage.completion_tokens == len(expected.token_ids)


def test_a_streamed_chat_answer_joins_to_the_whole_one(client: openai.OpenAI) -> None:
    asked = {"model": NAME, "messages": MESSAGES, "max_completion_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.usage for chunk in chunks if chunk.usage] == [whole.usage]


def test_chat_logprobs_name_tokens_with_their_bytes(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2
    ).choices[0]
    assert got.logprobs is not None and got.logprobs.content is not None
    for entry in got.logprobs.content:
        assert bytes(entry.bytes or []).decode() == entry.token
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob == entry.logprob
    assert "".join(entry.token for entry in got.logprobs.content) == got.message.content


def test_logprobs_of_a_character_in_pieces_give_its_bytes(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        model=NAME, messages=MESSAGES, logprobs=True, extra_body={"structured_outputs": {"choice": ["😀"]}}
    ).choices[0]
    assert got.message.content == "😀"
    assert bytes(b for entry in got.logprobs.content for b in entry.bytes).decode().strip() == "😀"


def test_an_answer_without_max_tokens_may_fill_what_is_left(client: openai.OpenAI, live: Live) -> None:
    got = client.chat.completions.create(model=NAME, messages=MESSAGES, temperature=0, stop=["."])
    assert got.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 1000}, "n"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"stop": ["a" * 2000]}, "stop"),
        ({"stop": ["a"] * 100}, "stop"),
        ({"logit_bias": {"999999": 1}}, None),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logprobs": 100}, "logprobs"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1 << 40]}, None),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"extra_body": {"no_such_thing": 1}}, "no_such_thing"),
        ({"suffix": "after"}, "suffix"),
    ],
)
def test_a_parameter_that_cannot_be_is_refused_by_name(client: openai.OpenAI, given: dict, param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": NAME, "prompt": "x", "max_tokens": 4, **given})
    error = caught.value.body
    assert isinstance(error, dict) and error["message"].endswith(".")
    assert error["type"] == "invalid_request_error"
    name = next(iter(given.get("extra_body", given)))
    assert error["param"] == param or (param is None and name in error["message"]), error


def test_an_unknown_model_is_a_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.completions.create(model="other", prompt="x")


def _column(ids: list[int]):
    import torch

    return torch.tensor(ids)[:, None]
