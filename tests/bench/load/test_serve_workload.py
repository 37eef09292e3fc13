from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentkv.bench.load.lengths import parse_lengths
from latentkv.bench.load.text import cut, generated_text, read_text
from latentkv.bench.load.workload import LoadRequest, TokenRuler, Workload
from latentkv.errors import RequestError

WORDS = {seed: generated_text(seed) for seed in (0, 1)}
RULER = TokenRuler(characters_per_token=5.0, overhead_tokens=10)


def workload(prompt: str = "100-200", prefix: int = 0, text: str | None = None, seed: int = 0) -> Workload:
    words = WORDS[seed] if text is None else text
    return Workload(parse_lengths(prompt), parse_lengths("10-20"), prefix, words, "words", seed)


def requests(load: Workload, part: int = 0, count: int = 50) -> list[LoadRequest]:
    return list(islice(load.requests(RULER, part, 4), count))


def test_the_same_seed_gives_the_same_requests_and_another_seed_others():
    assert requests(workload()) == requests(workload())
    assert requests(workload()) != requests(workload(seed=1))


def test_every_part_has_the_same_lengths_and_its_own_prompts():
    first, second = requests(workload(), 0), requests(workload(), 1)
    assert [(r.prompt_tokens, r.output_tokens) for r in first] == [(r.prompt_tokens, r.output_tokens) for r in second]
    beginnings = {request.prompt[:32] for request in first + second}
    assert len(beginnings) == 100


def test_prompts_are_as_long_as_the_ruler_says():
    for request in requests(workload()):
        assert 100 <= request.prompt_tokens <= 200
        assert len(request.prompt) == (request.prompt_tokens - 10) * 5


def test_a_shared_prefix_is_in_front_of_every_prompt_of_every_part_and_nothing_else_is_shared():
    load = workload(prefix=40)
    prompts = [r.prompt for part in range(4) for r in requests(load, part)]
    assert len({prompt[:200] for prompt in prompts}) == 1
    assert len({prompt[200:232] for prompt in prompts}) == len(prompts)
    assert requests(load)[0].prompt_tokens == 40 + requests(workload())[0].prompt_tokens


def test_the_calibration_reads_text_that_no_request_begins_with():
    sample = workload().sample(64)
    assert (len(sample.prompt), sample.output_tokens) == (64, 1)
    load = workload()
    assert all(not r.prompt.startswith(sample.prompt[:32]) for part in range(4) for r in requests(load, part))


@pytest.mark.parametrize("text", ["x", "Call me Ishmael. " * 3])
def test_short_text_repeats(text: str):
    load = workload(text=text)
    assert all(len(r.prompt) == (r.prompt_tokens - 10) * 5 for r in requests(load))


@given(st.text(min_size=1, max_size=20), st.data())
def test_a_piece_is_cut_from_the_text_repeated_for_ever(text: str, data: st.DataObject):
    start = data.draw(st.integers(0, len(text) - 1))
    length = data.draw(st.integers(0, 100))
    assert cut(text, start, length) == (text * 121)[start : start + length]


def test_a_prompt_has_at_least_one_character():
    assert RULER.characters(3) == 1


def test_generated_text_depends_on_the_seed_alone():
    assert generated_text(3) == generated_text(3) != generated_text(4)


def test_text_comes_from_a_file(tmp_path: Path):
    (tmp_path / "a.txt").write_text("Größe", encoding="utf-8")
    assert read_text(tmp_path / "a.txt") == "Größe"


@pytest.mark.parametrize("content", [None, b"", b" \n", b"na\xefve"])
def test_a_file_without_text_is_refused_by_name(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(RequestError, match=r"a\.txt"):
        read_text(tmp_path / "a.txt")


def test_a_negative_prefix_is_refused():
    with pytest.raises(RequestError, match="--shared-prefix"):
        workload(prefix=-1)
