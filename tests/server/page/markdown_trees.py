"""What Markdown is drawn as, and what it should be: both as trees that can be compared."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

VOID = frozenset({"br", "hr", "img"})
BLOCKS = frozenset({"blockquote", "li", "ol", "root", "table", "tbody", "thead", "tr", "ul"})
"""Elements between whose children line ends are layout of the HTML alone."""

# Trees of texts, each drawn by a view of its own: [tag, attributes, child, ...] with strings for text. `given[1]` says
# how many characters come at a time; 0: all. Boxes around code and tables are the page's own, and its marks on links.
TREES = """
const ATTRIBUTES = ["href", "title", "start"];
const tree = (node) => {
  if (node.nodeType === Node.TEXT_NODE) return node.data;
  if (node.className === "table") return tree(node.firstChild);
  const attributes = {};
  for (const name of ATTRIBUTES) if (node.hasAttribute(name)) attributes[name] = node.getAttribute(name);
  if (node.style.textAlign) attributes.align = node.style.textAlign;
  if (node.className === "image") attributes.image = true;
  if (node.className === "code") {
    const [language, text] = ["span", "pre"].map((name) => node.querySelector(name).textContent);
    return ["pre", {}, ["code", { language }, text]];
  }
  return [node.localName, attributes, ...[...node.childNodes].map(tree)];
};
const drawn = (text) => {
  const box = document.createElement("div");
  const view = new module.Markdown(box);
  for (let at = 0; at < text.length; at += given[1] || text.length) {
    view.push(text.slice(at, at + (given[1] || text.length)));
    view.draw();
  }
  view.finish(text);
  view.draw();
  return [...box.querySelectorAll(".part")].flatMap((part) => [...part.childNodes].map(tree));
};
return given[0].map(drawn);
"""


class _Reader(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[list[Any]] = [["root", {}]]
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        kept = {name: given[name] for name in ("href", "title", "start", "align") if name in given}
        if tag == "code" and self.stack[-1][0] == "pre":
            kept = {"language": given.get("class", "").removeprefix("language-")}
        if tag == "img":
            title = {"title": given["title"]} if given.get("title") else {}
            self._add(_image(given["alt"], {"href": given["src"], **title}, self.stack))
            return
        node = [f"h{min(6, int(tag[1]) + 2)}" if tag[0] == "h" and tag[1:].isdecimal() else tag, kept]
        self._add(node)
        if tag not in VOID:
            self.stack.append(node)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            self.stack.pop()

    def handle_data(self, data: str) -> None:
        self._add(data)

    def _add(self, child: Any) -> None:
        self.stack[-1].append(child)


def _image(words: str, attributes: dict[str, Any], stack: list[list[Any]]) -> Any:
    """As the page shows it: a link, or, within one, its words."""
    if any(node[0] == "a" for node in stack):
        return words
    return ["a", {**attributes, "image": True}, words or "without a name"]


def expected(html: str) -> list[Any]:
    """The tree that the page should draw for what a Markdown renderer makes HTML of."""
    return plain(_Reader(html).stack[0])[2:]


def plain(node: list[Any]) -> list[Any]:
    """A tree without the line ends that are layout of the HTML, texts side by side joined, empty ones left out."""
    tag, attributes, *children = node
    joined: list[Any] = []
    for child in children:
        if isinstance(child, str) and joined and isinstance(joined[-1], str):
            joined[-1] += child
        else:
            joined.append(child if isinstance(child, str) else plain(child))
    if tag in BLOCKS:
        joined = [child.strip("\n") if isinstance(child, str) else child for child in joined]
    for index, child in enumerate(joined):
        if isinstance(child, str) and index and joined[index - 1][0] == "br":
            joined[index] = child.removeprefix("\n")
    return [tag, attributes, *(child for child in joined if child != "")]
