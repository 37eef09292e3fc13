"""A headless Chromium, and the page in it as its reader uses it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

WAIT_S = 20.0
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # No process is made that no test uses: for pages to come, or for those to come back to.
    "--process-per-site",
    "--disable-features=SpareRendererForSitePerProcess,BackForwardCache",
]


@contextmanager
def chromium(profile: Path) -> Iterator[webdriver.Chrome]:
    """A browser with a fresh profile; skips the test where Chromium or its driver is not installed."""
    browser, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver_path is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in [*FLAGS, f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver_path))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page at one address: nothing that an earlier visit kept is there.

    The tab is the earlier visit's, emptied: a new one costs a process and a window's worth of work.

    Args:
        driver: the browser.
        url: of the page, with the slash at the end; any server that serves it.
    """

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        self.url = url
        if driver.current_url.startswith("http"):
            driver.execute_script("sessionStorage.clear()")
        driver.get("about:blank")
        origin = url.rstrip("/")
        driver.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": origin, "storageTypes": "all"})
        self.console()
        self.requested_origins()

    def open(self, *, width: int = 1280, height: int = 800, scheme: str = "light", motion: str = "reduce") -> None:
        """Loads the page in a window of this size, for a reader with these preferences."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.prefer(scheme, motion)
        self.driver.get(self.url)

    def prefer(self, scheme: str, motion: str = "reduce") -> None:
        """Changes what the reader's system prefers."""
        preferences = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
        features = [{"name": name, "value": value} for name, value in preferences.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def ask(self, text: str) -> None:
        """Types a message and presses Enter."""
        self.one("#message").send_keys(text, Keys.ENTER)

    def press(self, *keys: str) -> None:
        """Presses keys, wherever the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def click(self, label: str) -> None:
        """Clicks the last visible button with this label."""
        self.wait(lambda: self._buttons(label))[-1].click()

    def has_button(self, label: str) -> bool:
        """Whether a button with this label can be seen."""
        return bool(self._buttons(label))

    def _buttons(self, label: str) -> list[WebElement]:
        script = (
            "const [label] = arguments, seen = {visibilityProperty: true, opacityProperty: true};"
            "return [...document.querySelectorAll('button')].filter("
            "  (button) => button.checkVisibility(seen) && button.innerText.trim() === label)"
        )
        return self.run(script, label)

    @contextmanager
    def prepared(self, script: str) -> Iterator[None]:
        """Documents that are loaded meanwhile run this script before their own."""
        added = self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
        try:
            yield
        finally:
            self.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)

    def one(self, selector: str) -> WebElement:
        """The first element that fits."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        """Every element that fits."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """The whole text of the last element that fits, seen or not; "" where none does."""
        script = "return [...document.querySelectorAll(arguments[0])].at(-1)?.textContent ?? ''"
        return self.run(script, selector)

    @property
    def answer(self) -> str:
        """The last answer so far."""
        return self.text(".answer .body")

    @property
    def notice(self) -> str:
        """What the page tells below the conversation, with the labels of its buttons."""
        return self.text("#notice")

    @property
    def focused(self) -> str:
        """The id of the element with the focus, or its text or name where it has none."""
        return self.run(
            "const e = document.activeElement; return e.id || e.textContent.trim() || e.ariaLabel || e.localName"
        )

    def run(self, script: str, *arguments: Any) -> Any:
        """Runs a script in the page."""
        return self.driver.execute_script(script, *arguments)

    def imported(self, module: str, script: str, *arguments: Any) -> Any:
        """Runs a script with one of the page's modules as `module`."""
        call = (
            f"const [done] = [...arguments].slice(-1); const given = [...arguments].slice(0, -1);"
            f"import('{self.url}{module}').then((module) => {{ {script} }}).then(done, (e) => done(String(e)))"
        )
        return self.driver.execute_async_script(call, *arguments)

    def wait(self, condition: Callable[[], Any]) -> Any:
        """Waits until something holds, and gives it; fails after WAIT_S seconds."""
        waiting = WebDriverWait(self.driver, WAIT_S, 0.05, [StaleElementReferenceException])
        return waiting.until(lambda _: condition())

    def wait_idle(self) -> None:
        """Waits until no answer is under way."""
        self.wait(lambda: not self.run("return document.querySelector('#stop').checkVisibility()"))

    def console(self) -> list[str]:
        """What the console was told since the last call: errors of scripts and breaches of the policy among it."""
        return [f"{entry['source']}: {entry['message']}" for entry in self.driver.get_log("browser")]

    def requested_origins(self) -> set[str]:
        """Where requests went since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return {f"{urlsplit(url).scheme}://{urlsplit(url).netloc}/" for url in sent}
