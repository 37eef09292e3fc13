from collections.abc import Callable
from pathlib import Path

import pytest
from folders_for_text_tests import BUILDERS, TEXTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from latentkv.text import Tokenizer, load_tokenizer
from latentkv.text.stream import StreamDecoder

NAMES = [*(builder.__name__ for builder in BUILDERS), "stories"]
BOS_FROM_CONFIG = ("deepseek",)  # transformers 5 ignores add_bos_token beside a tokenizer.json, transformers 4 did not
BYTES = st.lists(st.integers(3, 258), max_size=12)  # byte tokens in the SentencePiece folders, single bytes elsewhere


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest, tokenizer_folder: Callable[[str], Path]) -> tuple[Tokenizer, AutoTokenizer]:
    folder = tokenizer_folder(request.param)
    theirs = AutoTokenizer.from_pretrained(folder)
    if request.param in BOS_FROM_CONFIG:
        theirs.add_bos_token = True
    return load_tokenizer(folder), theirs


def stream(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> str:
    decoder = StreamDecoder(tokenizer, skip_special=skip_special)
    return "".join([decoder.push(token_id) for token_id in ids]) + decoder.finish()


def test_texts_encode_and_decode_as_in_transformers(pair: tuple[Tokenizer, AutoTokenizer]) -> None:
    ours, theirs = pair
    marked = [f"{token}x {token} y" for token in theirs.get_added_vocab()]
    for text in [*TEXTS, *marked]:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text, allow_special=True) == ids
        bare = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_bos=False, allow_special=True) == bare
        for skip in (True, False):
            assert ours.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)
            assert stream(ours, ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(), skip=st.booleans())
def test_any_text_encodes_decodes_and_streams_alike(
    pair: tuple[Tokenizer, AutoTokenizer], text: str, skip: bool
) -> None:
    ours, theirs = pair
    ids = theirs(text)["input_ids"]
    assert ours.encode(text, allow_special=True) == ids
    expected = theirs.decode(ids, skip_special_tokens=skip)
    assert ours.decode(ids, skip_special=skip) == expected
    assert stream(ours, ids, skip) == expected


@settings(max_examples=80, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_any_ids_decode_and_stream_alike(
    pair: tuple[Tokenizer, AutoTokenizer], data: st.DataObject, skip: bool
) -> None:
    ours, theirs = pair
    anything = st.lists(st.integers(0, ours.vocab_size + 3), max_size=8)
    ids = [i for part in data.draw(st.lists(anything | BYTES, max_size=4)) for i in part]
    expected = theirs.decode(ids, skip_special_tokens=skip)
    assert ours.decode(ids, skip_special=skip) == expected
    assert stream(ours, ids, skip) == expected


def test_names_of_special_tokens_agree(pair: tuple[Tokenizer, AutoTokenizer]) -> None:
    ours, theirs = pair
    assert ours.bos_id == theirs.bos_token_id
    assert theirs.eos_token_id in ours.eos_ids
    assert ours.vocab_size == len(theirs)
    assert ours.adds_bos == (theirs("")["input_ids"][:1] == [theirs.bos_token_id])
