import asyncio
from dataclasses import replace

import pytest
from serve_server import FakeServer, running

from latentkv.bench.load.client import ServeClient
from latentkv.bench.load.lengths import parse_lengths
from latentkv.bench.load.preflight import Prepared, prepare, server_root
from latentkv.bench.load.text import generated_text
from latentkv.bench.load.workload import Workload
from latentkv.errors import RemoteServerError, RequestError

WORKLOAD = Workload(parse_lengths("700"), parse_lengths("8"), 0, generated_text(0), "common words", 0)


@pytest.fixture
def server():
    with running() as fake:
        yield fake


def prepared(url: str, workload: Workload = WORKLOAD, key: str | None = None, **changes: object) -> Prepared:
    wanted = {
        "model": None,
        "endpoint": "completions",
        "ignore_eos": True,
        "extra_body": {},
        "characters_per_token": None,
        **changes,
    }

    async def main() -> Prepared:
        async with ServeClient(url, api_key=key, timeout=20.0) as client:
            return await prepare(client, workload, **wanted)

    return asyncio.run(main())


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_the_model_the_fields_and_the_length_of_a_token_are_found_out(server: FakeServer, endpoint: str):
    server.overhead = 7
    found = prepared(server.url, endpoint=endpoint)
    assert found.form.model == "tiny"
    assert dict(found.form.fields) == {"ignore_eos": True, "stream_options": {"include_usage": True}}
    assert found.ruler.characters_per_token == 4.0
    assert found.ruler.overhead_tokens == 7.0
    assert found.notes == ()
    assert [body["max_tokens"] for body in server.bodies] == [1, 1]


def test_the_calibration_is_no_longer_than_the_prompts_need_but_long_enough_to_count(server: FakeServer):
    for prompt, characters in (("700", 2800), ("8", 2048), ("100k", 16384)):
        prepared(server.url, replace(WORKLOAD, prompt_tokens=parse_lengths(prompt)))
        assert len(server.bodies[-1]["prompt"]) == characters


def test_given_characters_per_token_save_the_calibration(server: FakeServer):
    found = prepared(server.url, characters_per_token=3.5)
    assert (found.ruler.characters_per_token, found.ruler.overhead_tokens) == (3.5, 0)
    assert len(server.bodies) == 1


def test_fields_that_the_server_refuses_are_left_out_and_that_is_said(server: FakeServer):
    server.refused_fields = ("ignore_eos",)
    found = prepared(server.url)
    assert "ignore_eos" not in found.form.fields
    assert [note for note in found.notes if "ignore_eos" in note]


def test_fields_of_the_user_are_sent_and_never_left_out(server: FakeServer):
    found = prepared(server.url, extra_body={"top_k": 5}, ignore_eos=False)
    assert dict(found.form.fields) == {"stream_options": {"include_usage": True}, "top_k": 5}
    server.refused_fields = ("top_k",)
    with pytest.raises(RemoteServerError, match="unknown field top_k"):
        prepared(server.url, extra_body={"top_k": 5})


def test_what_is_wrong_besides_a_refused_field_is_what_is_said(server: FakeServer):
    server.refused_fields, server.always = ("ignore_eos",), 500
    with pytest.raises(RemoteServerError, match="HTTP 500: refused with 500"):
        prepared(server.url)


def test_a_server_that_takes_neither_field_is_measured_if_told_how_long_tokens_are(server: FakeServer):
    server.refused_fields = ("ignore_eos", "stream_options")
    with pytest.raises(RemoteServerError, match="--chars-per-token"):
        prepared(server.url)
    found = prepared(server.url, characters_per_token=4.0)
    assert found.form.fields == {}
    assert len(found.notes) == 3
    assert "counted as chunks" in found.notes[2]


def test_one_token_without_text_is_no_reason_to_refuse(server: FakeServer):
    server.always = "silent"
    assert prepared(server.url, characters_per_token=4.0).form.model == "tiny"


def test_a_server_that_is_not_there(unused_url: str):
    with pytest.raises(RemoteServerError, match=f"No server can be reached at {unused_url}"):
        prepared(unused_url)
    with pytest.raises(RemoteServerError, match=f"No server can be reached at {unused_url}"):
        prepared(unused_url, model="tiny")


@pytest.mark.parametrize("model", [None, "tiny"])
@pytest.mark.parametrize("key", [None, "wrong"])
def test_a_wrong_key(server: FakeServer, model: str | None, key: str | None):
    server.key = "secret"
    with pytest.raises(RemoteServerError, match=r"refuses the API key .*OPENAI_API_KEY"):
        prepared(server.url, model=model, key=key)
    assert prepared(server.url, model=model, key="secret").form.model == "tiny"


def test_an_unknown_model_is_named_beside_those_that_are_there(server: FakeServer):
    server.models = ("tiny", "small")
    with pytest.raises(RemoteServerError, match=r"'huge'.*tiny, small"):
        prepared(server.url, model="huge")


@pytest.mark.parametrize(
    ("models", "listed"),
    [((), "none"), (("tiny", "small"), "tiny, small"), (tuple("abcdefghij"), "a, b, c, d, e, f, g, h and 2 more")],
)
def test_a_model_must_be_chosen_where_there_is_not_exactly_one(
    server: FakeServer, models: tuple[str, ...], listed: str
):
    server.models = models
    with pytest.raises(RemoteServerError, match=f"{listed}; choose one with --model"):
        prepared(server.url)


def test_a_server_that_fails_says_why(server: FakeServer):
    server.always = 500
    with pytest.raises(RemoteServerError, match="HTTP 500: refused with 500"):
        prepared(server.url)


@pytest.mark.parametrize(
    ("given", "root"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("https://host/v1", "https://host"),
        ("https://host/models/a/v1/", "https://host/models/a"),
    ],
)
def test_an_address_may_end_in_v1(given: str, root: str):
    assert server_root(given) == root


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://host", "http://", "", "http://a:99999", "http://a:0", "http://[::1"]
)
def test_what_is_no_address_is_refused(url: str):
    with pytest.raises(RequestError, match="not the address"):
        server_root(url)
