"""The page in a browser, against the server that serves it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files

import pytest
from page_browser import Page
from selenium import webdriver

from latentkv import LLM
from latentkv.server.protocol.chat import ChatRequest
from live_server import NAME, Live, serving

KEY = "a-long-enough-key"


@pytest.fixture(scope="module")
def locked() -> Iterator[Live]:
    with serving(LLM(kv_cache_bytes=16 << 20, step_seconds=0.25), api_keys=(KEY,)) as server:
        yield server


def test_a_conversation_with_the_real_server(browser: webdriver.Chrome, live: Live) -> None:
    page = Page(browser, f"{live.url}/")
    page.open()
    page.wait(lambda: page.text("#model") == NAME)
    page.ask("Tell me of the sea.")
    page.wait(lambda: len(page.answer) > 20)
    page.wait(lambda: "0 of" not in page.text("#panel"))
    page.wait(lambda: re.search(r"^[\d.,]+ tokens/s · first token after .* · [\d,]+ tokens · ", page.text(".figures")))
    assert page.one("#no-template").is_displayed()
    page.click("Stop")
    page.wait_idle()
    live.wait_until_free()
    assert [line for line in page.console() if "favicon" not in line] == []
    assert page.requested_origins() <= {f"{live.url}/", live.url}


def test_the_page_asks_for_the_key_and_goes_on_with_it(browser: webdriver.Chrome, locked: Live) -> None:
    page = Page(browser, f"{locked.url}/")
    page.open()
    page.wait(lambda: page.one("#key input").is_displayed())
    page.one("#key input").send_keys(KEY + "\n")
    page.wait(lambda: page.text("#model") == NAME)
    page.ask("The whale")
    page.wait(lambda: len(page.answer) > 5)
    page.click("Stop")
    locked.wait_until_free()


@pytest.mark.parametrize("name", ["temperature", "top_p", "max_tokens", "seed"])
def test_the_page_offers_no_number_that_the_server_refuses(name: str) -> None:
    html = (files("latentkv.server") / "page" / "index.html").read_text("utf-8")
    field = re.search(rf'<input name="{name}" type="number" min="([\d.]+)" max="([\d.]+)"', html)
    assert field is not None
    low, high = (float(each) if "." in each else int(each) for each in field.groups())
    for offered in (low, high):
        ChatRequest.model_validate({"messages": [{"role": "user", "content": "Hello"}], name: offered})
    if name == "temperature":
        with pytest.raises(ValueError, match="temperature"):
            ChatRequest.model_validate({"messages": [{"role": "user", "content": "Hello"}], name: high + 0.1})
