import threading

import pytest
from page_browser import Page
from page_server import PageServer, Reply, numbers, piece

# Milliseconds until the numbers are asked for again, each time that this is decided.
NOTE_PAUSES = """
window.pauses = [];
const wait = window.setTimeout;
window.setTimeout = (callback, milliseconds, ...more) => {
  const counted = String(callback).includes("#read");
  if (counted) pauses.push(milliseconds);
  return wait(callback, counted ? milliseconds / 10 : milliseconds, ...more);
};
"""
WIDTHS = "return [...document.querySelectorAll(arguments[0])].map((bar) => bar.getBoundingClientRect().width)"


def test_the_panel_shows_the_servers_numbers(server: PageServer, page: Page):
    page.open()
    page.wait(lambda: page.text("#panel-state") == "Live.")
    assert page.text("#cache-format") == "bf16"
    assert page.text("#fill-text") == "15 % of 7.68 MB, room for 10,000 tokens"
    assert (page.text("#used-bytes"), page.text("#kept-bytes")) == ("768 kB", "384 kB")
    assert [page.text(f"#{name}") for name in ("running", "waiting", "finished")] == ["1", "2", "34"]
    assert page.text("#about") == "LatentKV 0.1.0, up 1 min 1 s, context 4,096 tokens"
    meter = page.one("#fill")
    assert (meter.get_attribute("role"), meter.get_attribute("aria-valuenow")) == ("meter", "15")


@pytest.mark.parametrize("used_tokens", [100, 1_000, 5_000])
def test_multi_head_attention_is_drawn_to_the_scale_of_the_latents(server: PageServer, page: Page, used_tokens: int):
    used, mha = used_tokens * 768, used_tokens * 12_288
    server.stats = numbers(used_tokens=used_tokens, used_bytes=used, mha_bytes=mha, kept_bytes=0)
    page.open()
    page.wait(lambda: page.text("#panel-state") == "Live.")
    latent_px, mha_px = sum(page.run(WIDTHS, "#latent-lines span")), sum(page.run(WIDTHS, "#mha-lines span"))
    assert mha_px / latent_px == pytest.approx(16, rel=0.02)
    assert page.text("#compare-rest") == ""
    assert page.text("#compare-ratio") == "1/16"


def test_what_leaves_the_panel_is_told_as_a_number(server: PageServer, page: Page):
    whole = {"used_tokens": 10_000, "used_bytes": 7_680_000, "kept_bytes": 0}
    server.stats = numbers(**whole, mha_bytes=71 * 7_680_000, mha_ratio=71.0)
    page.open()
    page.wait(lambda: page.text("#panel-state") == "Live.")
    assert len(page.run(WIDTHS, "#mha-lines span")) == 8
    assert page.text("#compare-rest") == "and 63 more lines that do not fit here"
    assert page.text("#compare-scale") == "One line is the whole cache, 7.68 MB."


def test_an_idle_cache_is_compared_by_a_token(server: PageServer, page: Page):
    server.stats = numbers(used_tokens=0, used_bytes=0, mha_bytes=0, kept_bytes=0)
    page.open()
    page.wait(lambda: page.text("#panel-state") == "Live.")
    assert page.text("#latent-bytes") == "768 B"
    assert page.text("#mha-bytes") == "12.3 kB"
    assert "drawn for one token" in page.text("#compare-subject")


def test_numbers_are_asked_for_every_second_and_less_often_where_that_fails(server: PageServer, page: Page):
    with page.prepared(NOTE_PAUSES):
        page.open()
    page.wait(lambda: server.stats_asked >= 3)
    assert set(page.run("return pauses")) == {1000}
    server.stats = None
    page.wait(lambda: page.run("return pauses.at(-1)") == 4000)
    assert page.run("return pauses.slice(-3)") == [1000, 2000, 4000]
    server.stats = numbers()
    page.wait(lambda: page.text("#panel-state") == "Live.")


def test_a_question_refreshes_the_numbers_at_once(server: PageServer, page: Page):
    server.replies.append(Reply([piece(content="One"), threading.Event()]))
    page.open()
    page.wait(lambda: page.text("#panel-state") == "Live.")
    server.stats = None
    page.wait(lambda: "No numbers" in page.text("#panel-state"))
    server.stats = numbers()
    page.ask("Count")
    page.wait(lambda: page.text("#panel-state") == "Live.")
    page.click("Stop")
