import threading
from collections.abc import Callable

import pytest
from page_browser import Page
from page_server import ConnectionCut, PageServer, Reply, ending, piece, refusal, whole
from selenium.webdriver.common.keys import Keys

HOSTILE = "<img src=x onerror=\"document.title='broken in'\"><script>document.title='broken in'</script>"
FULL = "The server has as many requests as it can take"
BROKEN = "The connection broke before the answer was complete; try again."
AT_END = "return scrollY + innerHeight >= document.documentElement.scrollHeight - 2"


def test_an_answer_appears_while_it_streams_in(server: PageServer, page: Page):
    pause = threading.Event()
    server.replies.append(
        Reply([piece(role="assistant"), piece(content="It was"), pause, piece(content=" dark."), *ending()])
    )
    page.open()
    page.wait(lambda: page.text("#model") == "tiny-model")
    page.ask("How was it?")
    page.wait(lambda: page.answer == "It was")
    assert page.one("#stop").is_displayed()
    pause.set()
    page.wait(lambda: page.answer == "It was dark.")
    page.wait_idle()
    assert server.asked == [
        {
            "model": "tiny-model",
            "messages": [{"role": "user", "content": "How was it?"}],
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    ]
    assert page.console() == []


def test_bytes_may_be_cut_anywhere(server: PageServer, page: Page):
    stream = (
        ": a comment\r\n\r\n"
        'data: {"choices": [{"index": 0,\r\ndata: "delta": {"content": "né 😀"}}]}\r\n\r\n'
        'event: message\nid: 7\ndata:{"choices":[{"index":0,"delta":{"content":" 終"},"finish_reason":"stop"}]}\n\n'
        "data: [DONE]\n\n"
    ).encode()
    cuts: list = []
    for byte in stream:
        cuts += [bytes([byte]), passed := threading.Event()]
        passed.set()
    server.replies.append(Reply(cuts))
    page.open()
    page.ask("Hello")
    page.wait_idle()
    assert page.answer == "né 😀 終"
    assert page.notice == ""


@pytest.mark.parametrize(
    "stop", [lambda page: page.click("Stop"), lambda page: page.press(Keys.ESCAPE)], ids=["button", "key"]
)
def test_stopping_hangs_up_and_keeps_what_came(server: PageServer, page: Page, stop: Callable[[Page], None]):
    server.replies += [Reply([piece(content="One two"), threading.Event()]), whole("Three")]
    page.open()
    page.ask("Count")
    page.wait(lambda: page.answer == "One two")
    assert not server.hung_up.is_set()
    stop(page)
    assert server.hung_up.wait(2)
    page.wait_idle()
    assert page.answer == "One two"
    assert page.text(".answer .note") == "Stopped."
    assert page.notice == ""
    page.ask("Go on")
    page.wait(lambda: page.answer == "Three")
    assert [message["content"] for message in server.asked[1]["messages"]] == ["Count", "One two", "Go on"]


def test_a_tab_that_closes_hangs_up(server: PageServer, page: Page):
    server.replies.append(Reply([piece(content="One"), threading.Event()]))
    page.open()
    page.ask("Count")
    page.wait(lambda: page.answer == "One")
    page.driver.get("about:blank")
    assert server.hung_up.wait(2)


def test_the_keyboard_alone_is_enough(server: PageServer, page: Page):
    server.replies += [whole("First answer"), Reply([piece(content="Second"), threading.Event()])]
    page.open()
    page.wait(lambda: page.focused == "message")  # a browser heeds autofocus when it first draws the page
    page.press("one", Keys.SHIFT + Keys.ENTER, Keys.NULL, "two", Keys.ENTER)
    page.wait(lambda: page.answer == "First answer")
    page.wait_idle()
    assert server.asked[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]
    assert page.focused == "message"

    page.run("document.querySelector('.skip').focus()")
    order = [page.focused]
    for _ in range(12):
        page.press(Keys.TAB)
        order.append(page.focused)
        assert page.run("return document.activeElement.matches(':focus-visible')")
    assert order[:4] == ["Skip to the message box", "open-settings", "theme", "new-chat"]
    assert order[4:7] == ["one two", "Rename “one two”", "Delete “one two”"]
    assert order[7:] == ["Edit", "Copy", "Edit", "Regenerate", "attach", "message"]

    page.press(Keys.SHIFT + Keys.TAB + Keys.TAB, Keys.NULL)
    page.press(Keys.SPACE)
    page.wait(lambda: page.answer == "Second")
    assert page.focused == "message"
    page.press(Keys.ESCAPE)
    page.wait_idle()
    assert server.hung_up.wait(2)


def test_enter_while_an_answer_is_under_way_loses_nothing(server: PageServer, page: Page):
    pause = threading.Event()
    server.replies.append(Reply([piece(content="One"), pause, *ending()]))
    page.open()
    page.ask("Count")
    page.wait(lambda: page.answer == "One")
    page.ask("and then")
    assert "still under way" in page.notice
    assert page.one("#message").get_property("value") == "and then"
    pause.set()
    page.wait_idle()
    assert len(server.asked) == 1
    assert page.one("#message").get_property("value") == "and then"


def test_what_looks_like_markup_stays_text(server: PageServer, page: Page):
    assert server.stats is not None
    server.stats["model"] = HOSTILE
    link = "[click](javascript:alert(1)) <a href='javascript:alert(1)'>here</a>"
    call = {"index": 0, "function": {"name": HOSTILE, "arguments": HOSTILE}}
    fence = f"```{HOSTILE.replace(' ', '')}\n{HOSTILE}\n```\n- {HOSTILE}\n# {HOSTILE}\n**{HOSTILE}** `{HOSTILE}`"
    pieces = [
        piece(reasoning_content=HOSTILE),
        piece(content=f"{HOSTILE}\n\n{link}\n\n{fence}"),
        piece(tool_calls=[call]),
    ]
    server.replies += [Reply([*pieces, *ending()]), refusal(400, HOSTILE)]
    page.open()
    page.ask(HOSTILE)
    page.wait_idle()
    assert page.text(".question .body") == HOSTILE
    assert page.text(".reasoning div") == HOSTILE
    assert page.text(".calls code") == f"{HOSTILE}({HOSTILE})"
    assert page.answer.count(HOSTILE) == 6
    assert page.text(".code-bar span") == HOSTILE.replace(" ", "")
    assert link in page.answer
    page.ask("again")
    page.wait(lambda: HOSTILE in page.notice)
    assert page.all("#thread img, #thread script, #thread a, #notice img, header img, .answer [onerror]") == []
    assert page.run("return document.title") == "LatentKV"


def test_reasoning_is_open_while_it_comes_and_folds_when_the_answer_begins(server: PageServer, page: Page):
    pause = threading.Event()
    server.replies.append(Reply([piece(reasoning_content="Let me see."), pause, piece(content="Yes."), *ending()]))
    page.open()
    page.ask("Is it?")
    page.wait(lambda: page.text(".reasoning div") == "Let me see.")
    assert page.one(".reasoning").get_attribute("open")
    pause.set()
    page.wait_idle()
    assert page.answer == "Yes."
    assert not page.one(".reasoning").get_attribute("open")
    page.one(".reasoning summary").click()
    assert page.one(".reasoning div").is_displayed()


def test_an_edited_question_is_asked_in_place_of_the_old_one(server: PageServer, page: Page):
    server.replies += [whole("Answer one"), whole("Answer two")]
    page.open()
    page.ask("Fist question")
    page.wait_idle()
    page.all(".question .actions button")[0].click()
    page.press(Keys.CONTROL + "a", Keys.NULL, "First question", Keys.ENTER)
    page.wait(lambda: page.answer == "Answer two")
    assert server.asked[1]["messages"] == [{"role": "user", "content": "First question"}]
    assert len(page.all(".turn")) == 2


def test_an_edited_answer_is_what_the_model_reads_next(server: PageServer, page: Page):
    server.replies += [whole("It is cold."), whole("Yes.")]
    page.open()
    page.ask("Weather?")
    page.wait_idle()
    page.click("Edit")
    page.press(Keys.CONTROL + "a", Keys.NULL, "It is warm.", Keys.ENTER)
    assert page.answer == "It is warm."
    page.ask("Sure?")
    page.wait(lambda: page.answer == "Yes.")
    assert [message["content"] for message in server.asked[1]["messages"]] == ["Weather?", "It is warm.", "Sure?"]


def test_an_edit_that_is_given_up_changes_nothing(server: PageServer, page: Page):
    server.replies.append(whole("It is cold."))
    page.open()
    page.ask("Weather?")
    page.wait_idle()
    page.click("Edit")
    page.press("gone", Keys.ESCAPE)
    assert page.answer == "It is cold."
    assert page.focused == "Edit"
    assert page.all(".editor") == []


def test_regenerating_asks_the_same_again(server: PageServer, page: Page):
    server.replies += [whole("One way"), whole("Another way")]
    page.open()
    page.ask("How?")
    page.wait_idle()
    page.click("Regenerate")
    page.wait(lambda: page.answer == "Another way")
    page.wait_idle()
    assert server.asked[1] == server.asked[0]
    assert len(page.all(".answer")) == 1


def test_an_answer_comes_back_where_its_replacement_never_begins(server: PageServer, page: Page):
    server.replies += [whole("The old answer"), refusal(503, "The server is starting.")]
    page.open()
    page.ask("How?")
    page.wait_idle()
    page.click("Regenerate")
    page.wait(lambda: "cannot answer now" in page.notice)
    assert page.answer == "The old answer"


def test_a_reload_keeps_the_conversation_and_the_draft(server: PageServer, page: Page):
    server.replies.append(Reply([piece(content="Half an"), threading.Event()]))
    page.open()
    page.ask("A question")
    page.wait(lambda: page.answer == "Half an")
    page.one("#message").send_keys("a draft")
    page.driver.refresh()
    assert server.hung_up.wait(2)
    page.wait(lambda: page.answer == "Half an")
    assert page.text(".answer .note") in ("Stopped.", "Incomplete.")
    assert page.one("#message").get_property("value") == "a draft"


def test_settings_go_with_requests_and_stay_in_the_browser(server: PageServer, page: Page):
    server.replies += [whole("One"), whole("Two"), whole("Three")]
    page.open()
    page.click("Settings")
    for name, value in {"system": "Be brief.", "temperature": "0", "seed": "7"}.items():
        page.one(f"#settings [name={name}]").send_keys(value)
    page.one("#settings [name=top_p]").send_keys("3")
    page.press(Keys.ESCAPE)
    page.ask("Hello")
    page.wait_idle()
    body = server.asked[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["seed"]) == (0, 7)
    assert not {"top_p", "max_tokens"} & body.keys()

    page.driver.refresh()
    page.ask("Again")
    page.wait_idle()
    assert (server.asked[1]["temperature"], server.asked[1]["messages"][0]["role"]) == (0, "system")
    page.click("Settings")
    page.click("Empty all fields")
    page.click("Done")
    page.ask("Without")
    page.wait_idle()
    assert server.asked[2].keys() == {"model", "messages", "stream", "stream_options"}


def test_a_cut_off_answer_says_why(server: PageServer, page: Page):
    server.replies.append(Reply([piece(content="It was a"), *ending("length")]))
    page.open()
    page.ask("Tell")
    page.wait_idle()
    assert "token limit" in page.text(".answer .note")


def test_the_key_that_the_server_wants_is_asked_for_and_kept_in_the_tab_alone(server: PageServer, page: Page):
    server.api_key = "secret"
    server.replies += [whole("Welcome"), whole("Again")]
    page.open()
    page.wait(lambda: page.one("#key").is_displayed())
    page.press(Keys.ESCAPE)
    page.wait(lambda: page.has_button("Enter the API key"))
    page.ask("Hello")
    page.wait(lambda: page.one("#key").is_displayed())
    page.press("wrong", Keys.ENTER)
    page.wait(lambda: "did not accept" in page.text("#key-reason"))
    page.press("secret", Keys.ENTER)
    page.wait(lambda: page.answer == "Welcome")
    assert server.authorizations[-1] == "Bearer secret"
    assert page.run("return JSON.stringify(localStorage)").find("secret") == -1
    page.wait(lambda: page.text("#panel-state") == "Live.")
    page.driver.refresh()
    page.ask("Hello again")
    page.wait(lambda: page.answer == "Again")
    assert not page.one("#key").is_displayed()


def test_a_question_without_a_key_is_not_lost(server: PageServer, page: Page):
    server.api_key = "secret"
    server.replies.append(whole("Welcome"))
    page.open()
    page.wait(lambda: page.one("#key").is_displayed())
    page.press(Keys.ESCAPE)
    page.ask("Hello")
    page.wait(lambda: page.one("#key").is_displayed())
    page.click("Not now")
    page.wait(lambda: "wants an API key" in page.notice)
    assert page.text(".question .body") == "Hello"
    page.click("Try again")
    page.wait(lambda: page.one("#key").is_displayed())
    page.press("secret", Keys.ENTER)
    page.wait(lambda: page.answer == "Welcome")


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (
            refusal(429, "Full.", Retry_After="12"),
            f"{FULL}; try again in 12 seconds.",
        ),
        (refusal(429, "Full."), f"{FULL}; try again in a moment."),
        (
            refusal(400, "The prompt has 9,000 tokens; the context holds 4,096."),
            "The server refused this: The prompt has 9,000 tokens; the context holds 4,096.",
        ),
        (Reply([{}], 400), "The server refused this (400); change the message or the settings, then try again."),
        (
            refusal(503, "The engine is starting.", Retry_After="1"),
            "The server cannot answer now (The engine is starting); try again in a second.",
        ),
        (
            Reply([{"detail": "Out of luck"}], 500),
            "The server failed on this request (500) (Out of luck); try again, and look at its log if it fails again.",
        ),
        (
            Reply(["<html>"], content_type="text/html"),
            "This address answered with something that is not a stream; check that LatentKV serves it.",
        ),
        (
            Reply([{"error": {"message": "The engine died."}}]),
            "The server stopped the answer (The engine died); try again.",
        ),
        (Reply(["data: {broken\n\n"]), "The server sent something that is not part of an answer; try again."),
        (Reply([piece(role="assistant")]), BROKEN),
        (
            Reply([piece(role="assistant"), ConnectionCut]),
            BROKEN,
        ),
    ],
    ids=lambda value: None if isinstance(value, Reply) else value[:40],
)
def test_an_error_is_one_sentence_and_the_question_stays(server: PageServer, page: Page, reply: Reply, sentence: str):
    server.replies += [reply, whole("At last")]
    page.open()
    page.ask("A long question")
    page.wait(lambda: page.notice)
    assert page.notice == sentence + "Try again"
    assert page.one("#notice").get_attribute("role") == "alert"
    assert page.text(".question .body") == "A long question"
    assert page.all(".answer") == []
    page.click("Try again")
    page.wait(lambda: page.answer == "At last")
    page.wait_idle()
    assert page.notice == ""
    assert server.asked[1]["messages"] == [{"role": "user", "content": "A long question"}]


@pytest.mark.parametrize(
    "rest", [[], [ConnectionCut], [{"error": {"message": "The engine died."}}]], ids=["ends", "is cut", "fails"]
)
def test_of_a_stream_that_stops_in_the_middle_what_came_is_kept(server: PageServer, page: Page, rest: list):
    seen = threading.Event()
    server.replies += [Reply([piece(content="Half an"), seen, *rest]), whole("A whole answer")]
    page.open()
    page.ask("Tell")
    page.wait(lambda: page.answer == "Half an")
    seen.set()
    page.wait(lambda: page.notice)
    assert page.answer == "Half an"
    assert page.text(".answer .note") == "Incomplete."
    page.click("Try again")
    page.wait(lambda: page.answer == "A whole answer")
    assert len(page.all(".answer")) == 1
    assert server.asked[1]["messages"] == [{"role": "user", "content": "Tell"}]


def test_a_server_that_cannot_be_reached_is_told(server: PageServer, page: Page):
    server.replies.append(whole("Back again"))
    page.open()
    page.wait(lambda: page.text("#panel-state") == "Live.")
    page.driver.set_network_conditions(offline=True, latency=0, throughput=-1)
    try:
        page.ask("Anyone?")
        page.wait(lambda: page.notice)
    finally:
        page.driver.delete_network_conditions()
    assert page.notice.startswith("The server cannot be reached; check that it is running, then try again.")
    page.click("Try again")
    page.wait(lambda: page.answer == "Back again")


def test_a_question_without_an_answer_is_left_out_of_the_next_request(server: PageServer, page: Page):
    server.replies += [refusal(400, "No."), whole("Yes")]
    page.open()
    page.ask("First")
    page.wait(lambda: page.notice)
    page.ask("Second")
    page.wait(lambda: page.answer == "Yes")
    assert server.asked[1]["messages"] == [{"role": "user", "content": "Second"}]
    assert "left out" in page.text(".question .note:not(:empty)")


def test_the_speed_of_an_answer_counts_the_servers_tokens(server: PageServer, page: Page):
    usage = {"prompt_tokens": 512, "completion_tokens": 41, "prompt_tokens_details": {"cached_tokens": 448}}
    server.replies.append(Reply([piece(content="One"), piece(content=" two"), *ending(**usage)]))
    page.open()
    page.ask("Count")
    page.wait_idle()
    assert page.text(".answer .figures").endswith("41 tokens · prompt of 512 tokens, 448 of them cached")
    described = page.imported(
        "answering.js",
        """const speed = new module.Speed(1000);
        const texts = [speed.describe(3500)];
        const counted = (count) => speed.usage({ prompt_tokens: 1, completion_tokens: count });
        counted(3);
        speed.came(4000);
        texts.push(speed.describe(4000));
        counted(43);
        speed.came(5000);
        texts.push(speed.describe(9000));
        return texts;""",
    )
    assert described == [
        "waiting for the first token, 2 s",
        "first token after 3.00 s · 3 tokens · prompt of 1 token",
        "40.0 tokens/s · first token after 3.00 s · 43 tokens · prompt of 1 token",
    ]


def test_without_the_servers_count_no_speed_is_claimed(server: PageServer, page: Page):
    page.open()
    described = page.imported(
        "answering.js",
        """const speed = new module.Speed(0);
        for (const now of [1000, 2000, 3000]) speed.came(now);
        return speed.describe(3000);""",
    )
    assert described == "first token after 1.00 s"


def test_a_screen_reader_hears_sentences_and_not_every_token(server: PageServer, page: Page):
    words = [piece(content=f"Word {number}. ") for number in range(100)]
    pause = threading.Event()
    server.replies.append(Reply([*words, pause, piece(content="The last."), *ending()]))
    page.open()
    page.run(
        "window.said = []; new MutationObserver(() => said.push(announcer.textContent))"
        ".observe(announcer, { childList: true, characterData: true, subtree: true })"
    )
    page.ask("Count")
    page.wait(lambda: "Word 99." in page.answer)
    pause.set()
    page.wait_idle()
    said = page.run("return said")
    assert said[0] == "The model answers."
    assert said[-1].endswith("The last. End of the answer.")
    assert len(said) <= 4
    assert page.one("#thread").get_attribute("aria-live") == "off"


def test_the_page_follows_an_answer_until_its_reader_scrolls_up(server: PageServer, page: Page):
    pause, more = threading.Event(), threading.Event()
    long = "\n\n".join(f"Paragraph {number}" for number in range(60))
    server.replies.append(Reply([piece(content=long), pause, piece(content="\n\nMore" * 40), more, *ending()]))
    page.open()
    page.ask("Tell")
    page.wait(
        lambda: page.run("return scrollY > 500 && scrollY + innerHeight >= document.documentElement.scrollHeight - 2")
    )
    page.run("scrollTo(0, 100)")
    page.wait(lambda: page.has_button("To the end of the answer"))
    pause.set()
    page.wait(lambda: "More" in page.answer)
    assert page.run("return scrollY") == 100
    page.click("To the end of the answer")
    assert page.run(AT_END)
    more.set()
    page.wait_idle()
