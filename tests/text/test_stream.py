from collections.abc import Callable
from pathlib import Path

import pytest

from latentkv.text import StreamDecoder, Tokenizer, load_tokenizer

Folder = Callable[[str], Path]


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of single bytes, as both kinds of vocabulary write them."""
    spelled = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in text.encode()]
    if None not in spelled:
        return [token_id for token_id in spelled if token_id is not None]
    return tokenizer.encode(text, add_bos=False)


@pytest.mark.parametrize("name", ["deepseek", "llama2", "metaspace", "kimi"])
def test_no_push_shows_half_a_character(tokenizer_folder: Folder, name: str) -> None:
    tokenizer = load_tokenizer(tokenizer_folder(name))
    text = "🙃 ok 👨‍👩‍👧 é 漢字"
    ids = byte_ids(tokenizer, text)
    assert len(ids) > len(text)
    decoder = StreamDecoder(tokenizer)
    shown = [decoder.push(token_id) for token_id in ids]
    assert not any("\ufffd" in part for part in shown)
    assert "".join(shown) + decoder.finish() == text


def test_a_byte_level_character_is_shown_with_its_last_byte(tokenizer_folder: Folder) -> None:
    tokenizer = load_tokenizer(tokenizer_folder("deepseek"))
    decoder = StreamDecoder(tokenizer)
    ids = tokenizer.encode("🙃", add_bos=False)
    assert [decoder.push(token_id) for token_id in ids] == [""] * (len(ids) - 1) + ["🙃"]


def test_half_a_character_at_the_end_is_replaced(tokenizer_folder: Folder) -> None:
    for name in ("deepseek", "llama2"):
        tokenizer = load_tokenizer(tokenizer_folder(name))
        ids = byte_ids(tokenizer, "🙃")[:-1]
        decoder = StreamDecoder(tokenizer)
        assert [decoder.push(token_id) for token_id in ids] == [""] * len(ids)
        assert decoder.finish() == tokenizer.decode(ids) != ""


def test_invalid_bytes_do_not_pile_up(tokenizer_folder: Folder) -> None:
    tokenizer = load_tokenizer(tokenizer_folder("deepseek"))
    invalid = tokenizer.token_id("ÿ")  # byte 0xFF
    assert invalid is not None
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(invalid) for _ in range(1000)] == ["\ufffd"] * 1000


def test_only_the_first_space_of_a_text_is_dropped(tokenizer_folder: Folder) -> None:
    for name in ("llama2", "metaspace"):
        tokenizer = load_tokenizer(tokenizer_folder(name))
        ids = tokenizer.encode("the  the")
        decoder = StreamDecoder(tokenizer)
        shown = [decoder.push(token_id) for token_id in ids]
        assert "".join(shown) == "the  the"
        assert shown[1] == "the"


def test_special_tokens_are_shown_only_on_request(tokenizer_folder: Folder) -> None:
    tokenizer = load_tokenizer(tokenizer_folder("deepseek"))
    for skip, expected in ((True, "whale"), (False, "<｜begin｜>whale")):
        decoder = StreamDecoder(tokenizer, skip_special=skip)
        assert "".join(map(decoder.push, tokenizer.encode("whale"))) + decoder.finish() == expected


@pytest.mark.parametrize("name", ["deepseek", "kimi", "llama2", "wordpiece"])
def test_special_tokens_that_are_kept_are_text_and_no_others(tokenizer_folder: Folder, name: str) -> None:
    tokenizer = load_tokenizer(tokenizer_folder(name))
    begin, end = sorted(tokenizer.special_ids)[:2]
    kept = tokenizer.decode([end], skip_special=False)
    ids = [begin, *tokenizer.encode("whale", add_bos=False), end, begin]
    decoder = StreamDecoder(tokenizer, keep=[kept, "<no token>"])
    text = "".join(map(decoder.push, ids)) + decoder.finish()
    assert text == tokenizer.decode([i for i in ids if i != begin], skip_special=False)
    assert kept in text


def test_a_decoder_of_whole_texts_shows_all_at_the_end(tokenizer_folder: Folder) -> None:
    tokenizer = load_tokenizer(tokenizer_folder("wordpiece"))
    decoder = StreamDecoder(tokenizer)
    ids = tokenizer.encode("whale ,", add_bos=False)
    assert [decoder.push(token_id) for token_id in ids] == [""] * len(ids)
    assert decoder.finish() == tokenizer.decode(ids) != ""
