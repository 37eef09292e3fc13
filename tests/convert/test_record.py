"""The record of a conversion and its page: complete, self-contained, and as new as the weights."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from sources import some_tokens, write_source

from latentkv.convert import (
    PAGE_FILE,
    REPORT_FILE,
    ConvertOptions,
    HealOptions,
    convert_checkpoint,
    heal_checkpoint,
    note,
    read_record,
)
from latentkv.convert.page import render_page
from latentkv.convert.quality import compare_models
from latentkv.convert.record import add_healing
from latentkv.convert.stages import stages_of

pytestmark = pytest.mark.usefixtures("unpainted")  # but for one test

TOKENS, HELD_OUT = some_tokens(16), some_tokens(8, 48)
SPEED = {
    "tokens_per_second": {"source": 100.0, "converted": 125.0},
    "spread": {"source": 0.01, "converted": 0.02},
    "depth": 496,
    "new_tokens": 16,
    "repeats": 7,
    "threads": 2,
    "dtype": "fp32",
}
PAINT = Figure.savefig
ENVIRONMENT = {"latentkv": "0.1.0", "cpu": "a <fast> CPU", "threads": 2, "python": "3.11", "torch": "2.13"}


@pytest.fixture(scope="module")
def healed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose record has all that there can be."""
    folder = tmp_path_factory.mktemp("healed")
    source, out = write_source("llama", folder / "source"), folder / "out"
    convert_checkpoint(source, out, TOKENS, ConvertOptions(kv_budget=0.5))
    quality = compare_models(source, out, HELD_OUT)
    note(out, quality={**quality, "text": "a<b.txt", "sequences": 8, "length": 48}, speed=SPEED)
    note(out, source="llama & co", command="latentkv convert 'a<b'", environment=ENVIRONMENT)
    options = HealOptions(steps=12, match_steps=2, batch_size=4, lr=2e-3, eval_every=4)
    about = {"data": "self", "text": "a<b.txt", "command": "latentkv heal out", "environment": ENVIRONMENT}
    heal_checkpoint(out, source, TOKENS, options, held_out=HELD_OUT, about=about)
    return out


class Outside(HTMLParser):
    """Collects what a browser would fetch, and tags that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data", "action")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def text_of_page(page: str) -> str:
    """What a reader sees of it."""
    shown = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", shown))


def test_the_record_has_the_conversion_and_its_healing(healed: Path) -> None:
    record = json.loads((healed / REPORT_FILE).read_text())
    assert {"rank", "rope_dim", "forecasts", "layers", "cache", "quality", "speed", "command", "environment"} < set(
        record
    )
    for row in record["layers"]:
        assert {"output_error", "rope_energy", "kept_energy"} < set(row)
    healing = record["healings"][0]
    assert healing["tokens"] == 12 * 4 * 64 and healing["seconds"] > 0
    assert [tokens for tokens, _ in healing["matching"]] == [256 * (step + 1) for step in range(2)]
    assert [tokens for tokens, _ in healing["curve"]] == [256 * (step + 1) for step in range(2, 12)]
    assert [each["healing_tokens"] for each in healing["evaluations"]] == [0, 1024, 2048, 3072]


def test_a_long_curve_is_thinned_to_means_and_loses_no_step(healed: Path, tmp_path: Path) -> None:
    source = healed.parent / "source"
    options = HealOptions(steps=7, batch_size=4)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("latentkv.convert.heal._CURVE_POINTS", 4)
        copy = shutil.copytree(healed, tmp_path / "copy")
        healing = heal_checkpoint(copy, source, TOKENS, options, held_out=TOKENS)
    curve = read_record(copy)["healings"][1]["curve"]
    assert [tokens // 256 for tokens, _ in curve] == [2, 4, 6, 7]
    assert curve[-1][1] == pytest.approx(healing.losses[6])


def test_the_page_needs_nothing_from_outside_and_closes_its_tags(healed: Path) -> None:
    page = (healed / PAGE_FILE).read_text()
    parser = Outside()
    parser.feed(page)
    assert not parser.open
    assert len(parser.fetched) == 6  # three plots, each light and dark
    assert all(each.startswith("data:image/png;base64,") for each in parser.fetched)
    assert "http:" not in page and "https:" not in page and "url(" not in page and "<script" not in page
    assert "prefers-color-scheme: dark" in page


def test_the_page_has_pictures_for_light_and_for_dark(healed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", PAINT)
    found = re.findall(r"data:image/png;base64,([^\"]+)", render_page(read_record(healed)))
    pictures = [base64.b64decode(each) for each in found]
    assert len(pictures) == len(set(pictures)) == 6
    assert all(each.startswith(b"\x89PNG") and len(each) > 5_000 for each in pictures)


def test_the_page_says_what_was_saved_and_what_it_cost(healed: Path) -> None:
    record = read_record(healed)
    shown = text_of_page((healed / PAGE_FILE).read_text())
    stages = stages_of(record)
    assert stages.converted is not None and stages.healed is not None
    assert stages.healed["divergence"] < stages.converted["divergence"]
    assert "The KV cache takes 1/2 of the source's" in shown and "after healing" in shown
    for quality in (stages.converted, stages.healed):
        assert f"{quality['converted']:#.4g}".removesuffix(".") in shown and f"{quality['agreement']:.1%}" in shown
    for words in (
        "source converted healed",
        "1.25&times;",
        "496 tokens in the cache",
        "as converted",
        "3,072 tokens in",
    ):
        assert words in shown


def test_what_a_person_named_is_escaped(healed: Path) -> None:
    page = (healed / PAGE_FILE).read_text()
    assert "llama &amp; co" in page and "a&lt;b.txt" in page and "a &lt;fast&gt; CPU" in page
    assert "a<b" not in page


def test_healing_rewrites_the_page_and_a_second_one_is_added(tmp_path: Path) -> None:
    source, out = write_source("llama", tmp_path / "source"), tmp_path / "out"
    convert_checkpoint(source, out, TOKENS, ConvertOptions(rank=16, rope_dim=8))
    pages = [(out / PAGE_FILE).read_text()]
    for train in ("attention", "lora"):
        heal_checkpoint(out, source, TOKENS, HealOptions(steps=2, batch_size=4, train=train), held_out=HELD_OUT)
        pages.append((out / PAGE_FILE).read_text())
    assert "Healing" not in pages[0]
    assert "Attention's weights" in pages[1] and "Low-rank updates" not in pages[1]
    assert "Attention's weights" in pages[2] and "Low-rank updates (rank 16)" in pages[2]
    assert [each["train"] for each in read_record(out)["healings"]] == ["attention", "lora"]
    assert {path.name for path in out.iterdir()} >= {REPORT_FILE, PAGE_FILE}


@pytest.mark.parametrize("record", [{}, {"healings": []}, {"cache": {"dtype": "bf16", "before": 300, "after": 100}}])
def test_a_page_leaves_out_what_the_record_does_not_have(record: dict[str, Any]) -> None:
    page = render_page(record)
    assert "converted to latent attention" in page and "<img" not in page
    assert ("1/3 of the source's" in page) == ("cache" in record)


def measure(sample: str, perplexity: float) -> dict[str, Any]:
    return {"sample": sample, "source": 2.0, "converted": perplexity, "divergence": 0.1, "agreement": 0.5, "tokens": 9}


def test_stages_never_mix_texts() -> None:
    first = {"evaluations": [measure("a", 3.1), measure("a", 2.5)]}
    other = {"evaluations": [measure("b", 2.9), measure("b", 2.4)]}
    record = {"quality": measure("a", 3.0), "healings": [first]}
    stages = stages_of(record)
    assert (stages.converted, stages.healed) == (measure("a", 3.0), measure("a", 2.5))
    stages = stages_of(record | {"healings": [first, other]})
    assert (stages.converted, stages.healed) == (None, measure("b", 2.4))
    assert stages_of({"healings": [{"evaluations": []}]}).last is None


def test_a_healing_that_is_recorded_again_takes_its_own_place(tmp_path: Path) -> None:
    facts = {"train": "all", "lora_rank": 16, "match_steps": 0, "tokens": 8, "seconds": 1.0}
    for number, steps in ((0, 1), (0, 2), (1, 3)):
        add_healing(tmp_path, facts | {"steps": steps, "curve": [], "evaluations": []}, number=number)
    assert [each["steps"] for each in read_record(tmp_path)["healings"]] == [2, 3]
