"""The page in a real browser, served by a server that a test scripts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from page_browser import Page, chromium
from page_server import PageServer, serving
from selenium import webdriver

FAULTS = ("javascript:", "console-api:", "security:", "worker:")
"""What the console says of the page: failed scripts, errors that they report, breaches of the policy.

Answers with an error status ("network:") are scripted, and what Chromium tells of itself ("other:", "rendering:",
"intervention:", "deprecation:", ...) comes and goes with its version and the machine.
"""


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("chromium") / "profile") as driver:
        yield driver


@pytest.fixture(scope="session")
def running_server() -> Iterator[PageServer]:
    with serving() as server:
        yield server


@pytest.fixture
def server(running_server: PageServer) -> PageServer:
    """The scripted server, with nothing scripted yet."""
    running_server.reset()
    return running_server


@pytest.fixture
def page(browser: webdriver.Chrome, server: PageServer) -> Iterator[Page]:
    """The page, not yet loaded. No script may fail in it, and no rule of the policy be broken."""
    page = Page(browser, server.url)
    yield page
    assert [line for line in page.console() if line.startswith(FAULTS)] == []
    assert page.requested_origins() <= {server.url}
