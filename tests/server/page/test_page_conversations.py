"""The conversations that the browser keeps, and what goes with a message."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from page_browser import Page
from page_server import PageServer, Reply, ending, piece, whole
from selenium.webdriver.common.keys import Keys

TITLES = "return [...document.querySelectorAll('#list .open')].map((button) => button.textContent)"
ANOTHER_TAB = "sessionStorage.clear()"

# Files dropped on the page, as the browser hands them over: [name, text or bytes] each.
DROP = """
const transfer = new DataTransfer();
for (const [name, content] of arguments[0]) {
  transfer.items.add(new File([typeof content === "string" ? content : new Uint8Array(content)], name));
}
const fire = (type) => document.querySelector("main").dispatchEvent(
  new DragEvent(type, { dataTransfer: transfer, bubbles: true, cancelable: true }));
fire("dragover");
const marked = document.documentElement.classList.contains("dropping");
fire("drop");
return marked;
"""


def titles(page: Page) -> list[str]:
    """What the list of conversations shows."""
    return page.run(TITLES)


def sign(page: Page, name: str) -> None:
    """Clicks a button by its name for screen readers; it is seen when the mouse is over its row."""
    page.run("document.querySelector(`[aria-label='${arguments[0]}']`).click()", name)


def ask(page: Page, text: str) -> None:
    """Asks, and waits for the whole answer."""
    page.ask(text)
    page.wait(lambda: page.text(".question .body") == text)
    page.wait_idle()


@pytest.fixture
def two(server: PageServer, page: Page) -> Page:
    """The page with two conversations, the second of them open."""
    server.replies += [whole("Answer one"), whole("Answer two")]
    page.open()
    ask(page, "The first question")
    page.click("New chat")
    page.wait(lambda: page.one("#welcome").is_displayed())
    ask(page, "The second question")
    page.wait(lambda: len(titles(page)) == 2)
    return page


def test_conversations_are_listed_by_their_first_words_and_open_again(server: PageServer, two: Page) -> None:
    assert titles(two) == ["The second question", "The first question"]
    assert two.text("#list [aria-current]") == "The second question"
    two.click("The first question")
    two.wait(lambda: two.answer == "Answer one")
    assert two.text("#list [aria-current]") == "The first question"
    server.replies.append(whole("More"))
    ask(two, "And then")
    assert [message["content"] for message in server.asked[2]["messages"]] == [
        "The first question",
        "Answer one",
        "And then",
    ]
    two.wait(lambda: titles(two) == ["The first question", "The second question"])


def test_another_tab_finds_them_and_begins_a_new_one(two: Page) -> None:
    two.run(ANOTHER_TAB)
    two.driver.refresh()
    two.wait(lambda: titles(two) == ["The second question", "The first question"])
    assert two.one("#welcome").is_displayed()
    two.click("The second question")
    two.wait(lambda: two.answer == "Answer two")


def test_long_first_words_are_cut_between_words(server: PageServer, page: Page) -> None:
    server.replies.append(whole("Yes"))
    page.open()
    page.ask("one two three four five six seven eight nine ten eleven twelve thirteen fourteen")
    page.wait(lambda: titles(page) == ["one two three four five six seven eight nine ten eleven…"])


def test_a_deleted_conversation_is_gone_and_comes_back_by_undo(two: Page) -> None:
    two.one("#message").send_keys("a draft")
    sign(two, "Delete “The second question”")
    two.wait(lambda: titles(two) == ["The first question"])
    assert two.one("#welcome").is_displayed()
    assert "“The second question” is deleted." in two.notice
    assert two.one("#message").get_property("value") == "a draft"
    two.click("Undo")
    two.wait(lambda: titles(two) == ["The second question", "The first question"])
    assert two.answer == "Answer two"
    sign(two, "Delete “The first question”")
    two.wait(lambda: titles(two) == ["The second question"])
    assert two.answer == "Answer two"
    two.driver.refresh()
    two.wait(lambda: titles(two) == ["The second question"])


def test_deleting_ends_the_answer_under_way(server: PageServer, page: Page) -> None:
    server.replies.append(Reply([piece(content="One"), threading.Event()]))
    page.open()
    page.ask("Count")
    page.wait(lambda: page.answer == "One")
    sign(page, "Delete “Count”")
    assert server.hung_up.wait(2)
    page.wait(lambda: page.all(".turn") == [])
    page.wait(lambda: titles(page) == [])


def test_a_name_replaces_the_first_words_and_an_empty_one_brings_them_back(two: Page) -> None:
    sign(two, "Rename “The first question”")
    two.press(Keys.CONTROL + "a", Keys.NULL, "Whales", Keys.ENTER)
    two.wait(lambda: titles(two) == ["The second question", "Whales"])
    assert two.focused == "Whales"
    two.driver.refresh()
    two.wait(lambda: titles(two) == ["The second question", "Whales"])
    sign(two, "Rename “Whales”")
    two.press(Keys.CONTROL + "a", Keys.NULL, "Fish", Keys.ESCAPE)
    two.wait(lambda: titles(two) == ["The second question", "Whales"])
    sign(two, "Rename “Whales”")
    two.press(Keys.CONTROL + "a", Keys.NULL, Keys.BACKSPACE, Keys.ENTER)
    two.wait(lambda: titles(two) == ["The second question", "The first question"])


def test_leaving_a_conversation_ends_its_answer_and_keeps_what_came(server: PageServer, page: Page) -> None:
    server.replies.append(Reply([piece(content="Half an"), threading.Event()]))
    page.open()
    page.ask("Tell")
    page.wait(lambda: page.answer == "Half an")
    page.click("New chat")
    assert server.hung_up.wait(2)
    page.wait(lambda: page.one("#welcome").is_displayed())
    page.click("Tell")
    page.wait(lambda: page.answer == "Half an")
    assert page.text(".answer .note") == "Stopped."


def test_an_earlier_question_can_be_edited_and_what_came_after_it_brought_back(server: PageServer, page: Page) -> None:
    server.replies += [whole("One"), whole("Two"), whole("Instead")]
    page.open()
    ask(page, "First")
    ask(page, "Second")
    page.all(".question .actions button")[0].click()
    page.press(Keys.CONTROL + "a", Keys.NULL, "Another first", Keys.ENTER)
    page.wait(lambda: page.answer == "Instead")
    page.wait_idle()
    assert server.asked[2]["messages"] == [{"role": "user", "content": "Another first"}]
    assert len(page.all(".turn")) == 2
    page.click("Undo")
    page.wait(lambda: len(page.all(".turn")) == 4)
    assert (page.text(".question .body"), page.answer) == ("Second", "Two")


def test_without_storage_the_page_keeps_them_for_this_visit(server: PageServer, page: Page) -> None:
    server.replies += [whole("Answer one")]
    with page.prepared("Object.defineProperty(window, 'indexedDB', { get() { throw new DOMException('no'); } });"):
        page.open()
        ask(page, "The first question")
        page.wait(lambda: titles(page) == ["The first question"])
        page.click("New chat")
        page.wait(lambda: page.one("#welcome").is_displayed())
        page.click("The first question")
        page.wait(lambda: page.answer == "Answer one")


def test_dropped_files_go_with_the_message_as_text(server: PageServer, page: Page) -> None:
    server.replies.append(whole("I see"))
    page.open()
    assert page.run(DROP, [["notes.md", "# Notes\n```\ncode\n```"], ["left-out.txt", "no"], ["ü.py", "print(1)\n"]])
    page.wait(lambda: len(page.all("#attached li")) == 3)
    assert page.text("#attached li:first-child span:first-child") == "notes.md"
    sign(page, "Leave out left-out.txt")
    ask(page, "What is this?")
    assert server.asked[0]["messages"] == [
        {
            "role": "user",
            "content": "notes.md\n````\n# Notes\n```\ncode\n```\n````\n\nü.py\n```\nprint(1)\n```\n\nWhat is this?",
        }
    ]
    assert page.all("#attached li") == []
    assert [file.text for file in page.all(".question .file summary")] == ["notes.md 20 B", "ü.py 9 B"]
    page.driver.refresh()
    page.wait(lambda: len(page.all(".question .file")) == 2)


@pytest.mark.parametrize(
    ("name", "content"),
    [("photo.png", [0x89, 0x50, 0x4E, 0x47]), ("zeros.bin", [65, 0, 66]), ("latin.txt", [0xE9, 0x20])],
)
def test_a_file_that_is_no_text_is_refused_by_name(server: PageServer, page: Page, name: str, content: list) -> None:
    page.open()
    page.run(DROP, [[name, content]])
    page.wait(lambda: page.notice)
    assert page.notice == f"{name} is not taken: a file must be text in UTF-8 and have at most 8 MB."
    assert page.all("#attached li") == []


def test_files_can_be_chosen_too_and_be_the_whole_message(server: PageServer, page: Page, tmp_path: Path) -> None:
    server.replies.append(Reply([piece(content="I see"), *ending()]))
    file = tmp_path / "data.csv"
    file.write_text("a,b\n1,2\n", "utf-8")
    page.open()
    page.one("#files").send_keys(str(file))
    page.wait(lambda: page.all("#attached li"))
    page.click("Send")
    page.wait_idle()
    assert server.asked[0]["messages"] == [{"role": "user", "content": "data.csv\n```\na,b\n1,2\n```"}]
    page.wait(lambda: titles(page) == ["data.csv"])


def test_the_page_says_where_a_model_has_no_chat_template(server: PageServer, page: Page) -> None:
    page.open()
    page.wait(lambda: page.text("#panel-state") == "Live.")
    assert not page.one("#no-template").is_displayed()
    assert server.stats is not None
    server.stats["chat_template"] = False
    page.wait(lambda: page.one("#no-template").is_displayed())
