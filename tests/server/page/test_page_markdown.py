"""What a model writes, as the page draws it: Markdown, whole and as it comes."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from markdown_trees import TREES, expected, plain
from page_browser import Page
from page_server import PAGE, PageServer, Reply, ending, piece
from selenium import webdriver

Draw = Callable[[list[str], int], list[list[Any]]]

EXAMPLES: list[dict[str, Any]] = json.loads(Path(__file__).with_name("commonmark_examples.json").read_text("utf-8"))[
    "examples"
]
"""Of CommonMark 0.31.2, all of them; the file says whose they are."""

OTHER_SCHEMES = {596, 598, 599, 601}
"""Examples whose links lead neither to the web nor to mail: the page shows them as text."""
BARE_ADDRESSES = {602, 608, 611}
"""Examples in which a web address stands as text: the page makes a link of it, as GitHub does."""

TABLES = [
    "| tea | cup |\n| --- | --- |\n| 3 g | 200 |\n",
    "| left | middle | right |\n|:--|:-:|--:|\n| a | b | c |\n",
    "| no | outer :-: | bars |\n:-: | --- | ---\none | two | three\n",
    "| in a cell |\n| ------ |\n| `a \\| b` is code |\n| **a \\| b** is not |\n",
    "| ends | at |\n| --- | --- |\n| a | quote |\n> said\n",
    "| ends | at |\n| --- | --- |\n| an | empty line |\nstill one\n\na paragraph\n",
    "| two | names |\n| --- |\n| one column |\n",
    "| few | many |\n| --- | --- |\n| one |\n| one | two | three |\n",
    "| only | a head |\n| --- | --- |\n",
    "text before\n| and | a table |\n| --- | --- |\n| 1 | 2 |\n",
]
"""A table for each rule of GitHub's: alignment, bars in cells, where it ends, too few and too many cells."""


def has_html(text: str) -> bool:
    """Whether CommonMark passes some of a text on as HTML: the page shows that letter by letter."""
    blocks = MarkdownIt("commonmark").parse(text)
    tokens = [token for block in blocks for token in (block, *(block.children or []))]
    return any(token.type in ("html_block", "html_inline") for token in tokens)


@pytest.fixture(scope="module")
def open_page(browser: webdriver.Chrome, running_server: PageServer) -> Page:
    running_server.reset()
    page = Page(browser, running_server.url)
    page.open()
    return page


@pytest.fixture(scope="module")
def draw(open_page: Page) -> Draw:
    """Draws each text by itself, so many characters at a time (0: all), and gives their trees."""

    def drawn(texts: list[str], step: int) -> list[list[Any]]:
        trees = open_page.imported("markdown.js", TREES, texts, step)
        assert isinstance(trees, list), trees
        return [plain(["root", {}, *tree])[2:] for tree in trees]

    return drawn


@pytest.mark.parametrize("step", [0, 1], ids=["whole", "character by character"])
def test_markdown_is_drawn_as_the_examples_of_commonmark_say(draw: Draw, step: int) -> None:
    left_out = OTHER_SCHEMES | BARE_ADDRESSES
    held = [each for each in EXAMPLES if not has_html(each["markdown"]) and each["example"] not in left_out]
    assert (len(EXAMPLES), len(held)) == (652, 573)
    trees = draw([each["markdown"] for each in held], step)
    wrong = {
        each["example"]: tree
        for each, tree in zip(held, trees, strict=True)
        if tree != expected(each["html"])
    }  # fmt: skip
    assert wrong == {}


@pytest.mark.parametrize("step", [0, 1], ids=["whole", "character by character"])
def test_tables_are_drawn_as_github_reads_them(draw: Draw, step: int) -> None:
    reader = MarkdownIt("commonmark").enable("table")
    html = [re.sub(r'style="text-align:(\w+)"', r'align="\1"', reader.render(text)) for text in TABLES]
    assert draw(TABLES, step) == [expected(each) for each in html]
    assert sum("<table>" in each for each in html) == len(TABLES) - 1


def test_html_is_shown_letter_by_letter(draw: Draw) -> None:
    """Every example that CommonMark passes on as HTML: no element comes of it that Markdown has not."""
    texts = [each["markdown"] for each in EXAMPLES if has_html(each["markdown"])]
    assert len(texts) == 72

    def names(node: list[Any]) -> set[str]:
        return {node[0]}.union(*(names(child) for child in node[2:] if isinstance(child, list)))

    found = set().union(*(names(["root", {}, *tree]) for tree in draw(texts, 0)))
    markdown = {"root", "p", "pre", "code", "em", "strong", "a", "blockquote", "ul", "ol", "li", "hr", "br", "h3", "h4"}
    assert found <= markdown
    assert draw(["<b onclick='x()'>a</b>"], 0) == [[["p", {}, "<b onclick='x()'>a</b>"]]]


@pytest.mark.parametrize(
    "address",
    ["javascript:alert(1)", "JaVaScRiPt:alert(1)", "data:text/html,hi", "vbscript:x", "file:///etc/passwd", "blob:x"],
)
def test_a_link_leads_to_the_web_or_to_mail_alone(draw: Draw, address: str) -> None:
    text = f"[a]({address}) ![b]({address}) <{address}> [c]\n\n[c]: {address}\n"
    assert '"a"' not in json.dumps(draw([text], 0))
    assert draw(["[a](https://b.example)"], 0) == [[["p", {}, ["a", {"href": "https://b.example"}, "a"]]]]


def test_links_open_a_tab_that_learns_nothing_of_this_one(open_page: Page) -> None:
    found = open_page.imported(
        "markdown.js",
        """const box = document.createElement("div");
        const view = new module.Markdown(box);
        view.push("[a](https://b.example) ![c](https://d.example/e.png)");
        view.draw();
        return [...box.querySelectorAll("*")].map((node) => [node.localName, node.target, node.rel]);""",
    )
    assert (
        found[3:] == [["a", "_blank", "noopener noreferrer nofollow"]] * 2
    )  # after the chapter, its part and the paragraph


@pytest.mark.parametrize("step", [0, 7, 4000])
def test_an_address_given_at_the_end_serves_the_links_before_it(draw: Draw, step: int) -> None:
    text = "".join(f"Paragraph {number} with [a link][{number % 3}].\n\n" for number in range(200))
    text += "".join(f"[{number}]: https://example.com/{number}\n" for number in range(3))
    (tree,) = draw([text], step)
    assert len(tree) == 200
    assert all(paragraph[3] == ["a", paragraph[3][1], "a link"] for paragraph in tree)


@pytest.mark.parametrize("ends", ["\r\n", "\r", "\n"], ids=["CR LF", "CR", "LF"])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_lines_may_end_in_any_way(draw: Draw, ends: str, step: int) -> None:
    text = ends.join(["# a", "b", "", "- c", "- d", "", "```", "e", "", "f", "```"])
    assert draw([text], step) == draw(["# a\nb\n\n- c\n- d\n\n```\ne\n\nf\n```"], 0)


@pytest.mark.parametrize(
    "text",
    [
        "- " * 50_000,
        "> " * 50_000,
        "`" * 200_000,
        "**" * 100_000 + "a",
        "# " * 100_000,
        "| a " * 50_000,
        "<a" * 50_000,
        *(
            pytest.param(text, marks=pytest.mark.slow)
            for text in ("[a](" * 50_000, "*a " * 100_000, "_a*b`" * 20_000, "[a]: b\n" * 20_000, "```\n" * 50_001)
        ),
    ],
    ids=lambda text: text[:6],
)
def test_no_text_takes_the_page_for_ever(draw: Draw, text: str) -> None:
    """What looks for the end of each mark anew takes minutes of these; the browser gives a script 30 seconds."""
    assert draw([text], 0) is not None


GROWING = """
const [text, step] = given;
const { default: MarkdownIt } = await import(new URL("markdown-it.js", location.href));
let read = 0;
const parse = MarkdownIt.prototype.parse;
MarkdownIt.prototype.parse = function counted(source, env) {
  read += source.length;
  return parse.call(this, source, env);
};
const box = document.createElement("div");
document.body.append(box);
const view = new module.Markdown(box);
let mostRead = 0, mostChanged = 0;
const watch = new MutationObserver(() => {});
watch.observe(box, { childList: true, characterData: true, subtree: true });
try {
  for (let at = 0; at < text.length; at += step) {
    const before = read;
    view.push(text.slice(at, at + step));
    view.draw();
    mostChanged = Math.max(mostChanged, watch.takeRecords().length);
    mostRead = Math.max(mostRead, read - before);
  }
  return { read, most_read: mostRead, most_changed: mostChanged, shown: box.textContent.length };
} finally {
  MarkdownIt.prototype.parse = parse;
  box.remove();
}
"""
LONGEST = 24_576  # characters of a block that the page draws as one
PIECE = 2000
BLOCKS = {
    "paragraphs": "".join(f"Paragraph {number} says *something* about `it`.\n\n" for number in range(3000)),
    "a list": "".join(f"- item {number} of a list without an end\n" for number in range(3000)),
    "code": "```python\n" + "".join(f"value_{number} = function({number})\n" for number in range(3000)),
    "a table": "| a | b |\n| - | -: |\n" + "".join(f"| row {number} | {number} |\n" for number in range(3000)),
    "a line": "word " * 20_000,
    "a quote": "".join(f"> line {number}\n" for number in range(6000)),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_drawing_a_growing_text_costs_what_its_last_block_does(open_page: Page, kind: str) -> None:
    """However long the text is: a piece of it has no more read and no more nodes changed than a long block has."""
    text = BLOCKS[kind]
    found = open_page.imported("markdown.js", f"return (async () => {{ {GROWING} }})();", text, PIECE)
    assert isinstance(found, dict), found
    assert found["read"] <= len(text) / PIECE * 2 * LONGEST
    assert found["most_read"] <= 4 * (LONGEST + PIECE)
    assert found["most_changed"] <= 500
    assert found["shown"] > 0.5 * len(text)


@pytest.mark.parametrize("kind", ["code", "a table", "a list"])
def test_a_block_too_long_to_be_drawn_as_one_stays_one(draw: Draw, kind: str) -> None:
    (tree,) = draw([BLOCKS[kind]], PIECE)
    names = {"code": ["pre"], "a table": ["table"], "a list": ["ul"]}[kind]
    assert {node[0] for node in tree} == set(names)
    if kind != "a list":
        assert len(tree) == 1
    if kind == "code":
        assert tree[0][2][2] == BLOCKS["code"].partition("\n")[2]
    if kind == "a table":
        assert json.dumps(tree).count('"tr"') == 3001


def test_what_was_drawn_stays_while_the_text_grows(open_page: Page) -> None:
    kept = open_page.imported(
        "markdown.js",
        """const box = document.createElement("div");
        const view = new module.Markdown(box);
        const show = (text) => { view.push(text); view.draw(); };
        show("One\\n\\n- Tw");
        const part = box.querySelector('.part');
        const [first, list] = part.children;
        const item = list.firstChild;
        show("o **bold**\\n- three\\n\\n```\\ncode");
        const pre = box.querySelector("pre");
        show(" and more\\n```\\n");
        const stayed = [first, list, item, pre].map((node) => box.contains(node));
        return [...stayed, part.children.length, item.textContent, pre.textContent];""",
    )
    assert kept == [True, True, True, True, 3, "Two bold", "code and more\n"]


# What the page reads of Markdown between a key press and the next frame, in characters.
WATCH_KEYS = """
window.costs = [];
let read = 0;
const MarkdownIt = module.default;
const parse = MarkdownIt.prototype.parse;
MarkdownIt.prototype.parse = function counted(source, env) {
  read += source.length;
  return parse.call(this, source, env);
};
addEventListener("keydown", () => {
  const before = read;
  requestAnimationFrame(() => costs.push(read - before));
}, true);
"""
PROSE = "A paragraph with **bold** and `code` here and there, as a model writes it when it explains at length.\n\n"


@pytest.mark.slow
def test_twenty_megabytes_on_their_way_do_not_hold_up_a_key(server: PageServer, page: Page) -> None:
    """What stands between a key and the next frame is the drawing of a piece, however much has come or waits."""
    text = PROSE * (20_000_000 // len(PROSE))
    server.replies.append(
        Reply([*(piece(content=text[at : at + 2000]) for at in range(0, len(text), 2000)), *ending()])
    )
    page.open()
    page.imported("markdown-it.js", WATCH_KEYS)
    page.ask("Tell me everything")
    page.wait(lambda: page.answer)
    for number in range(60):
        for kind in ("keyDown", "keyUp"):
            page.driver.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": kind, "text": "x", "key": "x"})
        if number % 10 == 9:
            time.sleep(1)  # nobody types for a while: the page draws on
    page.wait(lambda: len(page.run("return costs")) >= 60)
    assert max(page.run("return costs")) <= 8 * (LONGEST + 2048)
    assert page.one("#message").get_property("value") == "x" * 60
    page.wait_idle()


def test_code_can_be_copied(server: PageServer, page: Page) -> None:
    server.replies.append(Reply([piece(content="Run\n\n```sh\nls -l\necho 'a  b'\n```"), *ending()]))
    page.open()
    origin = server.url.rstrip("/")
    grant = {"origin": origin, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    page.driver.execute_cdp_cmd("Browser.grantPermissions", grant)
    page.ask("How?")
    page.wait_idle()
    page.click("Copy code")
    page.wait(lambda: page.has_button("Copied"))
    assert page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])") == "ls -l\necho 'a  b'"


def test_the_reader_of_markdown_is_the_published_one_with_its_licence() -> None:
    digest = hashlib.sha256((PAGE / "markdown-it.js").read_bytes()).hexdigest()
    licence = (PAGE / "markdown-it.LICENSE.txt").read_text("utf-8")
    assert digest == "d5432491790141da046b1197353705db03264f40b5727f3b4b591f5aba193e30"
    assert "markdown-it 15.0.3" in licence
