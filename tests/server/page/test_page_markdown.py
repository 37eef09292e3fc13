from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt
from page_browser import Page
from page_server import PageServer, Reply, ending, piece

# Both trees: [tag, child, ...] with strings for text. Wrappers and the levels of headings are the page's own.
DRAW = """
const box = document.createElement("div");
new module.Markdown(box).draw(given[0]);
const tree = (node) => {
  if (node.nodeType === Node.TEXT_NODE) return node.data;
  if (node.className === "code") return ["pre", ["code", node.querySelector("pre").textContent]];
  const tag = /^h[456]$/.test(node.localName) ? `h${node.localName[1] - 3}` : node.localName;
  return [tag, ...[...node.childNodes].map(tree)];
};
return tree(box).slice(1);
"""


class Tree(HTMLParser):
    """HTML as nested lists; code blocks without the line end before `</code>`."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[list] = [["root"]]
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.stack[-1].append(node := [tag])
        self.stack.append(node)

    def handle_endtag(self, tag: str) -> None:
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        node = self.stack[-1]
        in_code = [part[0] for part in self.stack[-2:]] == ["pre", "code"]
        text = data.removesuffix("\n") if in_code else data
        if node[0] in ("ul", "ol", "root"):
            return
        if node[0] == "li":
            text = text.strip("\n")
        if text:
            node.append(text)


@pytest.fixture(scope="module")
def drawn(browser, running_server):
    """The page, open: its markdown module draws what a test gives it."""
    running_server.reset()
    page = Page(browser, running_server.url)
    page.open()
    return lambda text: page.imported("markdown.js", DRAW, text)


@pytest.mark.parametrize(
    "text",
    [
        "Plain words.",
        "Two lines\nof one paragraph.\n\nAnother one.",
        "**bold** and *italic*, __bold__ and _italic_, **bold with *italic* inside**",
        "snake_case_name and 2 * 3 * 4, a lone * and ** and _",
        "`code with **stars**` and ``a ` inside`` and an open ` tick",
        r"\*not italic\* and \`not code\`",
        "- one\n- two *italic*\n  - deeper\n  - deeper still\n- three",
        "3. three\n4. four\n   - with a dash\n5. five",
        "* a\n* b\n\nand text after",
        "Text\n- then a list\n- of two",
        "It began in\n1984. That was a year.",
        "```python\nif a < b:\n    print('*no italic*')\n```\nafter",
        "~~~\n```\nticks inside\n~~~",
        "```\nnever closed\n\n- not a list",
        "- item\n  ```\n  code in it\n  ```\n- next",
        "# Title\n## Second *part*\ntext",
        "above\n\n---\n\nbelow\n\n* * *\n\nend",
        "",
    ],
)
def test_markdown_is_read_as_commonmark_reads_it(drawn, text: str):
    assert drawn(text) == Tree(MarkdownIt("commonmark").render(text)).stack[0][1:]


@pytest.mark.parametrize(
    "text",
    ["- " * 50_000, "*a " * 100_000, "`" * 200_000, "**" * 100_000 + "a", "_a*b`" * 20_000, "# " * 100_000],
    ids=lambda text: text[:6],
)
def test_no_text_takes_the_page_for_ever(drawn, text: str):
    """What looks for the end of each mark anew takes minutes of these; the browser gives a script 30 seconds."""
    assert drawn(text)


def test_what_was_drawn_stays_while_the_text_grows(browser, running_server):
    running_server.reset()
    page = Page(browser, running_server.url)
    page.open()
    kept = page.imported(
        "markdown.js",
        """const box = document.createElement("div");
        const view = new module.Markdown(box);
        view.draw("One\\n\\nTw");
        const first = box.firstChild;
        view.draw("One\\n\\nTwo **bold**\\n\\n- three");
        return [first === box.firstChild, box.children.length, box.textContent];""",
    )
    assert kept == [True, 3, "OneTwo boldthree"]


def test_code_can_be_copied(server: PageServer, page: Page):
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
