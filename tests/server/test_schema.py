"""schemathesis over the server's own OpenAPI schema: whatever is sent, an answer that the schema documents."""

from __future__ import annotations

import json
import urllib.request

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from live_server import Live

OPERATIONS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/api/chat"),
    ("POST", "/api/generate"),
    ("POST", "/api/show"),
    ("GET", "/api/tags"),
    ("GET", "/api/version"),
    ("GET", "/version"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/v1/models"),
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/stats"),
]
CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)


@pytest.fixture(scope="module")
def schema(live: Live):
    return schemathesis.openapi.from_url(f"{live.url}/openapi.json")


@pytest.mark.parametrize("examples", [12, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_path_answers_anything_as_its_schema_says(schema, method: str, path: str, examples: int) -> None:
    # Not shrunk: what fails is told as a curl command, and smaller ones would take minutes to find.
    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate),
    )
    @given(case=schema[path][method].as_strategy())
    def any_request(case: schemathesis.Case) -> None:
        shorten(case.body, path)
        case.call_and_validate(timeout=20, checks=CHECKS)

    any_request()


def shorten(body: object, path: str) -> None:
    """No example may take minutes."""
    if not isinstance(body, dict):
        return
    unset = {"/v1/chat/completions": "max_tokens", "/v1/responses": "max_output_tokens"}.get(path)
    if unset and body.get(unset) is None:
        body[unset] = 8
    if path in ("/api/chat", "/api/generate"):
        options = body.setdefault("options", {}) or {}
        if isinstance(options, dict):
            body["options"] = {"max_tokens": 8, **{key: each for key, each in options.items() if each is not None}}
            shorten(body["options"], "")
    caps = {"max_tokens": 8, "max_completion_tokens": 8, "max_output_tokens": 8, "n": 4, "best_of": 4}
    for name, most in caps.items():
        if isinstance(body.get(name), (int, float)):
            body[name] = most if body[name] == -1 else min(body[name], most)  # -1: as many as fit


def test_the_schema_names_every_path_and_no_422(live: Live) -> None:
    document = json.load(urllib.request.urlopen(f"{live.url}/openapi.json"))
    assert {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/models", "/tokenize", "/detokenize",
            "/health", "/metrics", "/stats"} <= set(document["paths"])  # fmt: skip
    assert "422" not in json.dumps(document)
