import re
import threading
import time
from importlib.resources import files
from typing import Any

import pytest
from page_browser import Page
from page_server import PageServer, Reply, ending, piece, refusal, whole
from selenium.webdriver.common.keys import Keys

TEXT = (
    """Words, **bold** ones, `code` and a list:

1. one
2. two

> a quote, with [a link](https://example.com) and ![a picture](https://example.com/a.png)

| a table | with | numbers | and | more | columns | than | a | telephone | is | wide |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
| row | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 | 10 |

```python
print("a line of code that is much longer than any telephone is wide, and must scroll in its own box")
```

"""
    + "Averylongword" * 20
)

# Every visible text of the page against what is painted behind it, as WCAG 2 counts.
LOW_CONTRAST = """
const parse = (color) => {
  const context = document.createElement("canvas").getContext("2d");
  context.fillStyle = color;
  context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data];
};
const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (node) => {
  for (let at = node; at; at = at.parentElement) {
    const color = parse(getComputedStyle(at).backgroundColor);
    if (color[3] === 255) return color;
  }
  return parse(getComputedStyle(document.documentElement).colorScheme === "dark" ? "black" : "white");
};
const low = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !node.checkVisibility()) continue;
  const [a, b] = [luminance(parse(getComputedStyle(node).color)), luminance(behind(node))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) low.push(`${walker.currentNode.data.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
}
return low;
"""
OVERFLOW = "const root = document.documentElement; return root.scrollWidth - root.clientWidth"
# What scrolls up and down with a bar of its own: the whole page, and nothing in it.
SCROLL_BARS = """
return [...document.querySelectorAll("*")].filter((node) => {
  const style = getComputedStyle(node);
  const scrolls = node === document.documentElement || ["auto", "scroll"].includes(style.overflowY);
  const isLonger = node.scrollHeight > node.clientHeight + 1;
  return scrolls && isLonger && style.scrollbarWidth !== "none" && node.checkVisibility();
}).map((node) => node.id || node.localName);
"""
BACKGROUND = "return getComputedStyle(document.body).backgroundColor"


DEVICES = {"desktop": (1280, 800), "phone": (390, 780)}


def show_everything(server: PageServer, page: Page) -> None:
    """A conversation with an answer of every kind, and an error."""
    server.replies += [
        Reply([piece(reasoning_content="Hm."), piece(content=TEXT), *ending("length")]),
        refusal(429, "Full.", Retry_After="5"),
    ]
    page.wait(lambda: page.text("#panel-state") == "Live.")
    page.ask("A question with Averylongword" + "andanother" * 20)
    page.wait_idle()
    page.ask("Once more")
    page.wait(lambda: page.notice)


@pytest.mark.slow  # the same is asked of axe, in less detail
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(server: PageServer, page: Page, scheme: str):
    page.open(scheme=scheme)
    page.wait(lambda: page.text("#panel-state") == "Live.")
    assert page.run(LOW_CONTRAST) == []
    show_everything(server, page)
    assert page.run(LOW_CONTRAST) == []
    server.stats = None
    page.wait(lambda: "No numbers" in page.text("#panel-state"))
    assert page.run(LOW_CONTRAST) == []
    page.click("Settings")
    assert page.run(LOW_CONTRAST) == []


def test_the_theme_is_the_systems_until_the_switch_says_otherwise(server: PageServer, page: Page):
    page.open(scheme="light")
    light = page.run(BACKGROUND)
    page.prefer("dark")
    dark = page.run(BACKGROUND)
    assert dark != light
    page.click("Light")
    assert page.run(BACKGROUND) == light
    page.driver.refresh()
    assert page.run(BACKGROUND) == light
    page.click("Dark")
    assert page.run(BACKGROUND) == dark
    page.prefer("light")
    assert page.run(BACKGROUND) == light


@pytest.mark.parametrize("width", [320, *(pytest.param(width, marks=pytest.mark.slow) for width in (390, 768)), 1280])
def test_nothing_scrolls_sideways(server: PageServer, page: Page, width: int):
    page.open(width=width, height=700)
    show_everything(server, page)
    if width < 960:
        page.one("#show-panel").click()
        assert page.one("#panel").is_displayed()
    assert page.run(OVERFLOW) == 0
    page.run("document.querySelector('#settings').showModal()")
    assert page.run(OVERFLOW) == 0
    page.press(Keys.ESCAPE)


def test_on_a_phone_the_numbers_unfold_from_the_head(server: PageServer, page: Page):
    page.open(width=390, height=700)
    page.wait(lambda: page.text("#show-panel") == "Cache 15 %")
    toggle = page.one("#show-panel")
    assert (toggle.get_attribute("aria-expanded"), page.one("#panel").is_displayed()) == ("false", False)
    toggle.send_keys(Keys.ENTER)
    assert (toggle.get_attribute("aria-expanded"), page.one("#panel").is_displayed()) == ("true", True)


def test_a_reader_who_wants_no_motion_sees_none(server: PageServer, page: Page):
    moving = (
        "return [...document.querySelectorAll('*')].filter((node) => {"
        "const style = getComputedStyle(node);"
        "return style.animationName !== 'none' || style.transitionDuration !== '0s'; }).length"
    )
    page.open(motion="reduce")
    assert page.run(moving) == 0
    page.prefer("light", motion="no-preference")
    assert page.run(moving) > 0


@pytest.mark.slow  # axe asks it, too
def test_every_field_and_button_has_a_name(server: PageServer, page: Page):
    page.open()
    show_everything(server, page)
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"button", "textbox", "spinbutton", "meter", "log", "article", "region", "complementary", "dialog"}
    found = [(node["role"]["value"], node.get("name", {}).get("value")) for node in tree if not node.get("ignored")]
    named = [(role, name) for role, name in found if role in roles]
    assert {"button", "textbox", "meter", "log", "complementary"} <= {role for role, _ in named}
    assert [role for role, name in named if not name] == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(server: PageServer, page: Page, scheme: str, device: str):
    pytest.importorskip("axe_core_python", reason="axe-core comes with the package axe-core-python")
    axe = files("axe_core_python").joinpath("axe.min.js").read_text("utf-8")
    width, height = DEVICES[device]
    page.open(width=width, height=height, scheme=scheme)
    page.run(axe)

    def serious() -> list[tuple[str, list[Any]]]:
        found = page.driver.execute_async_script("axe.run(document).then(arguments[0])")["violations"]
        return [
            (each["id"], [node["target"] for node in each["nodes"]])
            for each in found
            if each["impact"] in ("serious", "critical")
        ]

    assert serious() == []
    show_everything(server, page)
    assert serious() == []
    for toggle in ("#show-chats", "#show-panel"):
        if page.one(toggle).is_displayed():
            page.one(toggle).click()
            assert serious() == []
            page.press(Keys.ESCAPE)
    page.click("Settings")
    assert serious() == []


@pytest.mark.parametrize("device", DEVICES)
def test_the_page_has_one_scroll_bar(server: PageServer, page: Page, device: str):
    width, height = DEVICES[device]
    server.replies += [whole("Yes\n\n" * 40) for _ in range(3)]
    page.open(width=width, height=height)
    page.wait(lambda: page.text("#panel-state") == "Live.")
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": 400, "deviceScaleFactor": 1, "mobile": False,
    })  # fmt: skip
    for number in range(3):
        page.ask(f"Question {number}")
        page.wait(lambda number=number: page.text(".question .body") == f"Question {number}")
        page.wait_idle()
    page.one("#message").send_keys(*["line", Keys.SHIFT + Keys.ENTER, Keys.NULL] * 12)
    for toggle in ("#show-chats", "#show-panel"):
        if page.one(toggle).is_displayed():
            page.one(toggle).click()
            assert page.run(SCROLL_BARS) == ["html"]
    assert page.run(SCROLL_BARS) == ["html"]


def test_a_speed_is_said_once(server: PageServer, page: Page):
    """Beside the answer that it is of, and nowhere else."""
    counted = {"prompt_tokens": 5, "completion_tokens": 1}
    pause = threading.Event()
    server.replies.append(Reply([piece(content="One") | {"usage": counted}, pause, piece(content=" two"), *ending()]))
    page.open()
    page.wait(lambda: page.text("#panel-state") == "Live.")
    page.ask("Count")
    page.wait(lambda: page.answer == "One")
    time.sleep(0.1)  # or there is none to speak of
    pause.set()
    page.wait_idle()
    shown = page.run("return document.body.innerText")
    assert re.findall(r"tok\w*/s|tokens a second|tokens per second", shown) == ["tokens/s"]
