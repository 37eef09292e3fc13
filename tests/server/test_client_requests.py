"""Requests as clients send them: what asks for nothing new passes, what means a parameter of ours works, all else is
refused by name.
"""

from __future__ import annotations

import gzip
import http.client
import json
import zlib
from typing import Any

import pytest

from latentkv import LLM, SamplingParams
from live_server import NAME, Live, ask, serving

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES = [{"role": "user", "content": "Tell me of the sea."}]
PLAIN: dict[str, dict[str, Any]] = {
    CHAT: {"messages": MESSAGES, "max_tokens": 6, "temperature": 0},
    COMPLETIONS: {"prompt": "It was a", "max_tokens": 6, "temperature": 0},
    RESPONSES: {"input": "Tell me of the sea.", "max_output_tokens": 6, "temperature": 0},
}
"""Requests to which one thing is added."""


def text_of(answer: dict[str, Any]) -> str:
    if "output" in answer:
        return answer["output"][0]["content"][0]["text"]
    choice = answer["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.fixture(scope="module")
def plain(live: Live) -> dict[str, str]:
    """What the requests of PLAIN are answered."""
    return {path: text_of(ask(live, path, body)[1]) for path, body in PLAIN.items()}


ANYWHERE: list[dict[str, Any]] = [
    {"metadata": {"a": "b"}},
    {"service_tier": "auto"},
    {"prompt_cache_key": "x", "prompt_cache_retention": "24h"},
    {"safety_identifier": "x", "user": "y"},
    {"store": False},
    {"stream_options": {"include_usage": True}},
    {"nobody_knows": None, "nor_this": [], "or_this": {}, "nor_that": ""},
]
GENERATION: list[dict[str, Any]] = [
    {"top_k": -1},
    {"seed": -1},
    {"stop": ""},
    {"stop": ["", ""]},
    {"repetition_penalty": 1, "repeat_penalty": 1.0},
    {"typical_p": 1.0, "tfs_z": 1, "mirostat": 0, "mirostat_tau": 5.0, "dry_multiplier": 0, "dry_base": 1.75},
    {"use_beam_search": False, "length_penalty": 1.0, "early_stopping": False, "bad_words": [], "priority": 0},
    {"skip_special_tokens": True, "spaces_between_special_tokens": False, "include_stop_str_in_output": False},
    {"cache_prompt": True, "id_slot": -1, "samplers": None, "timings_per_token": False, "keep_alive": "5m"},
    {"cache_prompt": False},
    {"cache_salt": "mine"},
    {"max_tokens": 6.0, "top_k": 0.0},
    {"guided_decoding_backend": "xgrammar", "grammar": "", "options": {}},
    {"prediction": {"type": "content", "content": "It was"}},
    {"bad_words": ["zanzibar", "(x|y)*\\d/<>!\"'#-&~`{}[]^$.,;=?@:%", "\U0001f600\u2014\n\r\t"]},
]
CHATS: list[dict[str, Any]] = [
    {"modalities": ["text"]},
    {"reasoning_effort": "low"},
    {"reasoning": {"effort": "high"}},
    {"thinking": {"type": "disabled"}, "think": False},
    {"verbosity": "medium"},
    {"verbosity": "low", "web_search_options": {}},
    {"function_call": "none", "functions": [], "tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
    {"logprobs": False, "top_logprobs": 0},
    {"logprobs": 0},
    {"add_generation_prompt": True, "continue_final_message": False, "add_special_tokens": False},
    {"best_of": 1, "echo": False, "separate_reasoning": True, "include_reasoning": True, "documents": []},
    {"reasoning_format": "auto"},
    {"response_format": {"type": "text"}},
]
OTHERS: list[dict[str, Any]] = [
    {"include": [], "tools": [], "tool_choice": "auto", "parallel_tool_calls": False, "truncation": "disabled"},
    {"include": ["reasoning.encrypted_content"], "reasoning": {"effort": "medium", "summary": "auto"}},
    {"background": False, "top_logprobs": 0, "max_tool_calls": 3, "text": {"verbosity": "medium"}},
]


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        *((path, extra) for path in PLAIN for extra in ANYWHERE),
        *((path, extra) for path in (CHAT, COMPLETIONS) for extra in GENERATION),
        *((CHAT, extra) for extra in CHATS),
        *((RESPONSES, extra) for extra in OTHERS),
        (COMPLETIONS, {"suffix": "", "logprobs": False, "add_special_tokens": True}),
    ],
    ids=str,
)
def test_what_asks_for_nothing_new_changes_no_answer(
    live: Live, plain: dict[str, str], path: str, extra: dict[str, Any]
) -> None:
    status, answer, _ = ask(live, path, {**PLAIN[path], **extra})
    assert status == 200, answer
    assert text_of(answer) == plain[path]


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        (CHAT, "store", True),
        (RESPONSES, "store", True),
        (CHAT, "modalities", ["text", "audio"]),
        (CHAT, "functions", [{"name": "f"}]),
        (CHAT, "web_search_options", {"search_context_size": "low"}),
        (CHAT, "chat_template", "{{ x }}"),
        (CHAT, "documents", [{"text": "x"}]),
        (CHAT, "thinking", {"type": "enabled", "budget_tokens": 100}),
        (CHAT, "reasoning_effort", "much"),
        (CHAT, "best_of", 2),
        (CHAT, "max_tokens", 0),
        (CHAT, "max_tokens", -2),
        (CHAT, "temperature", 50),
        (COMPLETIONS, "mirostat", 2),
        (COMPLETIONS, "mirostat", False),
        (COMPLETIONS, "typical_p", 0.9),
        (COMPLETIONS, "use_beam_search", True),
        (COMPLETIONS, "include_stop_str_in_output", True),
        (COMPLETIONS, "skip_special_tokens", False),
        (COMPLETIONS, "grammar", 'root ::= "a"'),
        (COMPLETIONS, "suffix", "after"),
        (COMPLETIONS, "n_predict", 0),
        (COMPLETIONS, "metadata", "a text"),
        (COMPLETIONS, "nobody_knows", False),
        (COMPLETIONS, "top_k", -2),
        (COMPLETIONS, "seed", 2**64),
        (RESPONSES, "tools", [{"type": "web_search"}]),
        (RESPONSES, "truncation", "auto"),
        (RESPONSES, "previous_response_id", "resp_1"),
        (RESPONSES, "include", ["message.output_text.logprobs"]),
    ],
)
def test_what_would_change_the_answer_and_cannot_is_refused_by_name(
    live: Live, path: str, name: str, value: object
) -> None:
    status, answer, _ = ask(live, path, {**PLAIN[path], name: value})
    assert status == 400
    assert answer["error"]["param"] in (name, "reasoning_effort") and answer["error"]["message"].endswith(".")
    assert name in answer["error"]["message"]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"n_predict": 9}, {"max_tokens": 9}),
        ({"repeat_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"guided_json": {"type": "boolean"}}, {"structured_outputs": {"json": {"type": "boolean"}}}),
        ({"json_schema": {"type": "boolean"}}, {"structured_outputs": {"json": {"type": "boolean"}}}),
        ({"guided_regex": "[0-9]{3}"}, {"structured_outputs": {"regex": "[0-9]{3}"}}),
        ({"guided_choice": ["yes", "no"]}, {"structured_outputs": {"choice": ["yes", "no"]}}),
        ({"guided_grammar": 'start: "a"'}, {"structured_outputs": {"grammar": 'start: "a"'}}),
        (
            {"response_format": {"type": "json_object", "schema": {"type": "boolean"}}},
            {"structured_outputs": {"json": {"type": "boolean"}}},
        ),
    ],
)
def test_a_word_of_another_server_means_what_ours_does(live: Live, theirs: dict, ours: dict) -> None:
    plain = {"prompt": "It was a", "temperature": 0}
    expected = ask(live, COMPLETIONS, {**plain, **ours})[1]["choices"]
    assert ask(live, COMPLETIONS, {**plain, **theirs})[1]["choices"] == expected
    assert expected != ask(live, COMPLETIONS, plain)[1]["choices"]


def test_two_words_for_one_thing_must_agree(live: Live) -> None:
    status, answer, _ = ask(live, COMPLETIONS, {"prompt": "x", "n_predict": 4, "max_tokens": 5})
    assert status == 400 and "n_predict and max_tokens" in answer["error"]["message"]


def test_minus_one_is_as_many_tokens_as_fit() -> None:
    with serving(LLM(dtype="fp32", kv_cache_bytes=1 << 20, max_context=64)) as own:
        for path in PLAIN:
            name = "max_output_tokens" if path == RESPONSES else "max_tokens"
            answer = ask(own, path, {**PLAIN[path], name: -1})[1]
            usage = answer["usage"]
            ended = "completed" if path == RESPONSES else "stop"
            reason = answer.get("status") or answer["choices"][0]["finish_reason"]
            assert usage["total_tokens"] == 64 or reason == ended


def test_a_guidellm_stream_counts_its_tokens_as_it_goes(live: Live) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    for path in (CHAT, COMPLETIONS):
        lines = ask(live, path, {**PLAIN[path], **options, "ignore_eos": True})[1].split("\n\n")
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[-1] == 6 and len(set(counts)) > 3
        bare = ask(live, path, {**PLAIN[path], "stream": True})[1]
        assert "usage" not in bare


@pytest.mark.parametrize(
    ("sent", "means"),
    [
        ([{"role": "assistant", "content": None}], [{"role": "assistant", "content": ""}]),
        ([{"role": "assistant", "content": None, "refusal": "No."}], [{"role": "assistant", "content": "No."}]),
        ([{"role": "tool", "content": None, "tool_call_id": "1"}], [{"role": "tool", "content": ""}]),
        ([{"role": "assistant", "content": "x", "reasoning": "y"}], [{"role": "assistant", "content": "x"}]),
        ([{"role": "user", "content": "a", "id": "1", "timestamp": 5}], [{"role": "user", "content": "a"}]),
        ([{"role": "user", "content": "a", "weight": 1, "prefix": False}], [{"role": "user", "content": "a"}]),
        ([{"role": "developer", "content": "a"}], [{"role": "system", "content": "a"}]),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "text", "text": "b"}]}],
            [{"role": "user", "content": "ab"}],
        ),
        (
            [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}],
            [{"role": "assistant", "content": "no"}],
        ),
    ],
)  # fmt: skip
def test_a_history_is_read_as_clients_send_it_back(live: Live, reference: LLM, sent: list, means: list) -> None:
    status, answer, _ = ask(live, "/tokenize", {"messages": [*MESSAGES, *sent, *MESSAGES]})
    assert status == 200, answer
    assert answer["tokens"] == reference.chat_tokens(reference.chat_text([*MESSAGES, *means, *MESSAGES]))


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "narrator", "content": "a"}, "messages[1].role"),
        ({"role": "user", "content": "a", "prefix": True}, "messages[1].prefix"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages[1].content[0]"),
        ({"role": "user", "content": "a", "images": ["x"]}, "messages[1].images"),
        ({"role": "user", "content": None}, "content"),
    ],
)
def test_a_message_that_asks_for_what_cannot_be_is_refused_by_name(live: Live, message: dict, named: str) -> None:
    for path in (CHAT, "/tokenize"):
        status, answer, _ = ask(live, path, {"messages": [*MESSAGES, message]})
        assert status == 400 and named in answer["error"]["message"]


def test_offsets_point_into_the_text_which_has_no_begin_token(live: Live) -> None:
    given = "It was — só"
    answer = ask(live, COMPLETIONS, {"prompt": given, "max_tokens": 8, "echo": True, "logprobs": 0, "temperature": 0})
    (choice,) = answer[1]["choices"]
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert tokens[0] == "<s>" and offsets[:2] == [0, 0]
    for token, start in list(zip(tokens, offsets, strict=True))[1:]:
        assert "\ufffd" in token or choice["text"].startswith(token, start)
    without = ask(live, COMPLETIONS, {"prompt": given, "max_tokens": 8, "logprobs": 0, "temperature": 0})[1]["choices"][
        0
    ]
    assert without["logprobs"]["text_offset"] == [at - len(given) for at in offsets[-8:]]


def test_the_begin_token_can_be_left_out(live: Live, reference: LLM) -> None:
    ids = list(reference.request("It was a").prompt_token_ids)
    bare = ask(live, COMPLETIONS, {**PLAIN[COMPLETIONS], "add_special_tokens": False})[1]
    expected = reference.generate([ids[1:]], SamplingParams(max_tokens=6, temperature=0))[0]
    assert bare["usage"]["prompt_tokens"] == len(ids) - 1
    assert text_of(bare) == expected.text


def raw(live: Live, method: str, path: str, body: str | bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(live.url.removeprefix("http://"), timeout=20)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def test_a_body_without_a_type_is_json_unless_a_web_page_sent_it(live: Live) -> None:
    body = json.dumps(PLAIN[COMPLETIONS])
    form = "application/x-www-form-urlencoded"  # what curl -d says
    assert raw(live, "POST", COMPLETIONS, body)[0] == 200
    assert raw(live, "POST", COMPLETIONS, body, Content_Type=form)[0] == 200
    assert raw(live, "POST", COMPLETIONS, body, Content_Type=form, Origin="https://evil.example")[0] == 400


@pytest.mark.parametrize(
    "path", ["/health", "/version", "/v1/models", f"/v1/models/{NAME}", "/metrics", "/stats", "/openapi.json", "/"]
)
def test_what_can_be_got_can_be_asked_for_its_head(live: Live, path: str) -> None:
    assert raw(live, "GET", path)[0] == 200
    assert raw(live, "HEAD", path) == (200, b"")


def test_a_key_may_come_in_the_headers_of_other_clients() -> None:
    with serving(LLM(kv_cache_bytes=4 << 20), api_keys=("sesame-open",)) as own:
        for header in ("x_api_key", "api_key"):
            assert raw(own, "GET", "/v1/models", **{header: "sesame-open"})[0] == 200
            assert raw(own, "GET", "/v1/models", **{header: "sesame-shut"})[0] == 401
        both = {"Authorization": "Bearer sesame-shut", "x_api_key": "sesame-open"}
        assert raw(own, "GET", "/v1/models", **both)[0] == 401


def test_whoever_salts_shares_prefixes_with_the_same_salt_alone(live: Live) -> None:
    counters = live.llm.engine.counters
    prompt = "The whale and the old captain went to sea again. " * 12

    def hits(**more: Any) -> int:
        before = counters.prefix_hits
        assert ask(live, COMPLETIONS, {"prompt": prompt, "max_tokens": 1, **more})[0] == 200
        return counters.prefix_hits - before

    assert hits(cache_salt="one") == 0
    assert hits(cache_salt="one") > 0
    assert hits(cache_salt="two") == hits(cache_prompt=False) == hits() == 0


def test_seeds_beyond_ours_are_seeds_all_the_same(live: Live) -> None:
    def text(seed: int) -> str:
        return text_of(ask(live, COMPLETIONS, {"prompt": "It was a", "max_tokens": 12, "seed": seed})[1])

    for seed in (2**63 - 1, 2**63 + 5, 2**64 - 1, -2, -(2**63)):
        assert text(seed) == text(seed)
    assert len({text(seed) for seed in (3, 2**63 + 5, -2)}) == 3


def test_bad_words_do_not_occur(live: Live) -> None:
    asked = {**PLAIN[COMPLETIONS], "max_tokens": 24}
    free = text_of(ask(live, COMPLETIONS, asked)[1])
    word = free.split()[1]
    text = text_of(ask(live, COMPLETIONS, {**asked, "bad_words": [word, word[:3]]})[1])
    assert text and word[:3] not in text and text != free
    for other in ({"structured_outputs": {"choice": ["a"]}}, {"response_format": {"type": "json_object"}}):
        status, answer, _ = ask(live, COMPLETIONS, {**asked, "bad_words": ["sea"], **other})
        assert status == 400 and f"{next(iter(other))} and bad_words" in answer["error"]["message"]


def test_the_last_message_can_be_gone_on_with(live: Live, reference: LLM) -> None:
    begun = {"role": "assistant", "content": "The sea is"}
    turn = reference.chat_text([*MESSAGES, begun], add_generation_prompt=False)
    expected = reference.generate(
        [reference.chat_tokens(turn[: turn.rindex("is") + 2])], SamplingParams(max_tokens=6, temperature=0)
    )[0]
    for extra in ({"continue_final_message": True, "add_generation_prompt": False}, {"continue_final_message": True}):
        answer = ask(live, CHAT, {**PLAIN[CHAT], "messages": [*MESSAGES, begun], **extra})[1]
        assert text_of(answer) == expected.text
        assert answer["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    for key in ("prefix", "partial"):
        answer = ask(live, CHAT, {**PLAIN[CHAT], "messages": [*MESSAGES, {**begun, key: True}]})[1]
        assert text_of(answer) == expected.text
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert ask(live, CHAT, {**PLAIN[CHAT], "messages": [*MESSAGES, begun], **both})[0] == 400
    empty = {"messages": [*MESSAGES, {"role": "assistant", "content": ""}], "continue_final_message": True}
    status, answer, _ = ask(live, CHAT, {**PLAIN[CHAT], **empty})
    assert status == 400 and "no text to go on with" in answer["error"]["message"]


def test_an_answer_need_not_be_opened_and_may_have_a_begin_token(live: Live, reference: LLM) -> None:
    closed = reference.chat_text(MESSAGES, add_generation_prompt=False)
    tokens = reference.chat_tokens(closed)
    assert ask(live, "/tokenize", {"messages": MESSAGES, "add_generation_prompt": False})[1]["tokens"] == tokens
    answer = ask(live, CHAT, {**PLAIN[CHAT], "add_generation_prompt": False})[1]
    assert answer["usage"]["prompt_tokens"] == len(tokens)
    assert text_of(answer) == reference.generate([tokens], SamplingParams(max_tokens=6, temperature=0))[0].text
    more = ask(live, CHAT, {**PLAIN[CHAT], "add_special_tokens": True})[1]
    assert more["usage"]["prompt_tokens"] == len(reference.chat_tokens(reference.chat_text(MESSAGES))) + 1


def test_usage_tells_what_was_known_of_the_prompt(live: Live) -> None:
    prompt = "Of ships and of sealing wax, of cabbages and of kings. " * 10
    body = {"prompt": prompt, "max_tokens": 1, "cache_salt": "usage", "n": 2}
    first, second = (ask(live, COMPLETIONS, body)[1]["usage"] for _ in range(2))
    assert first["prompt_tokens_details"] == {"cached_tokens": 0}
    assert 64 <= second["prompt_tokens_details"]["cached_tokens"] < second["prompt_tokens"]
    streamed = ask(live, COMPLETIONS, {**body, "stream": True, "stream_options": {"include_usage": True}})[1]
    assert json.loads(streamed.split("data: ")[-2])["usage"]["prompt_tokens_details"] == second["prompt_tokens_details"]


def test_compressed_bodies_are_read_within_the_limit_on_what_they_hold(live: Live, plain: dict[str, str]) -> None:
    body = json.dumps(PLAIN[COMPLETIONS]).encode()
    half = len(body) // 2
    codings = {
        "gzip": (gzip.compress(body), gzip.compress(body[:half]) + gzip.compress(body[half:])),
        "deflate": (zlib.compress(body),),
        "identity": (body,),
    }
    for coding, sent in codings.items():
        for each in sent:
            status, answer = raw(live, "POST", COMPLETIONS, each, Content_Encoding=coding)
            assert (status, text_of(json.loads(answer))) == (200, plain[COMPLETIONS])
    bomb = gzip.compress(b" " * (8 << 20))
    assert len(bomb) < 10_000 and raw(live, "POST", COMPLETIONS, bomb, Content_Encoding="gzip")[0] == 413
    assert raw(live, "POST", COMPLETIONS, gzip.compress(body)[:-9], Content_Encoding="gzip")[0] == 400
    assert raw(live, "POST", COMPLETIONS, body, Content_Encoding="gzip")[0] == 400
    status, answer = raw(live, "POST", COMPLETIONS, body, Content_Encoding="br")
    assert status == 415 and "'br'" in json.loads(answer)["error"]["message"]


def test_the_version_is_told(live: Live) -> None:
    assert ask(live, "/version")[1] == {"version": ask(live, "/stats")[1]["version"]}


def test_a_wish_that_the_template_does_not_know_is_named_in_a_header(live: Live) -> None:
    assert "verbosity" in ask(live, CHAT, {**PLAIN[CHAT], "verbosity": "low"})[2]["X-LatentKV-Note"]
    assert "X-LatentKV-Note" not in ask(live, CHAT, PLAIN[CHAT])[2]
