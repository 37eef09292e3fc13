import pytest
from page_browser import Page
from page_server import PageServer, Reply, ending, piece, refusal
from selenium.webdriver.common.keys import Keys

TEXT = (
    """Words, **bold** ones, `code` and a list:

1. one
2. two

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
BACKGROUND = "return getComputedStyle(document.body).backgroundColor"


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
    page.wait(lambda: page.text("#show-panel") == "41.3 tok/s · 15 %")
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


def test_every_field_and_button_has_a_name(server: PageServer, page: Page):
    page.open()
    show_everything(server, page)
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"button", "textbox", "spinbutton", "meter", "log", "article", "region", "complementary", "dialog"}
    found = [(node["role"]["value"], node.get("name", {}).get("value")) for node in tree if not node.get("ignored")]
    named = [(role, name) for role, name in found if role in roles]
    assert {"button", "textbox", "meter", "log", "complementary"} <= {role for role, _ in named}
    assert [role for role, name in named if not name] == []
