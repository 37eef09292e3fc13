import json
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import folders_for_text_tests as folders
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentkv.errors import TokenizerError
from latentkv.llm_options import EMBEDDED_MODEL
from latentkv.text import StreamDecoder, Tokenizer, has_tokenizer, load_tokenizer, require_match

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def kimi(tokenizer_folder: Folder) -> Tokenizer:
    return load_tokenizer(tokenizer_folder("kimi"))


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([token_id]) for token_id in tokenizer.encode(text)]


def test_special_tokens_in_a_users_text_are_only_text(tokenizer_folder: Folder) -> None:
    for name in ("deepseek", "llama2", "kimi"):
        tokenizer = load_tokenizer(tokenizer_folder(name))
        marker = next(t for t in ("<｜end｜>", "</s>", "[EOS]") if tokenizer.token_id(t) is not None)
        ids = tokenizer.encode(f"a{marker}b", add_bos=False)
        assert not tokenizer.special_ids & set(ids)
        assert tokenizer.decode(ids) == f"a{marker}b"
        assert tokenizer.token_id(marker) in tokenizer.encode(f"a{marker}b", add_bos=False, allow_special=True)


def test_bos_is_put_once_and_only_where_asked(tokenizer_folder: Folder) -> None:
    for name in ("deepseek", "llama3", "llama2", "metaspace"):
        tokenizer = load_tokenizer(tokenizer_folder(name))
        bare = tokenizer.encode("the whale", add_bos=False)
        assert tokenizer.bos_id not in bare
        assert tokenizer.encode("the whale") == tokenizer.encode("the whale", add_bos=True) == [tokenizer.bos_id, *bare]
        assert tokenizer.adds_bos
    qwen = load_tokenizer(tokenizer_folder("qwen"))
    assert qwen.bos_id is None
    assert not qwen.adds_bos
    assert qwen.encode("the whale") == qwen.encode("the whale", add_bos=False)
    with pytest.raises(TokenizerError, match="no begin-of-sequence"):
        qwen.encode("the whale", add_bos=True)


def test_stop_ids_are_those_of_tokenizer_and_generation_config(tmp_path: Path) -> None:
    folders.qwen(tmp_path / "q")
    assert load_tokenizer(tmp_path / "q").eos_ids == {2}
    (tmp_path / "q/generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert load_tokenizer(tmp_path / "q").eos_ids == {0, 2}
    (tmp_path / "q/generation_config.json").write_text('{"eos_token_id": 1}')
    assert load_tokenizer(tmp_path / "q").eos_ids == {1, 2}


def test_kimi_pieces_follow_its_pattern(kimi: Tokenizer) -> None:
    # "文E" is a token too, and 12 could be merged after any digit: only the pattern keeps them apart.
    assert pieces(kimi, "中文English混合") == ["中文", "English", "混合"]
    assert pieces(kimi, " whale whale") == [" whale", " whale"]
    assert pieces(kimi, "01212") == ["0", "12", "12"]
    assert pieces(kimi, "00012") == ["0", "0", "0", "12"]
    assert pieces(kimi, "00120") == ["0", "0", "1", "2", "0"]


def test_kimi_has_its_special_tokens_and_reserved_ids(kimi: Tokenizer) -> None:
    base = kimi.bos_id
    assert base is not None
    assert kimi.eos_ids == {base + 1}
    assert kimi.vocab_size == base + 256
    assert kimi.token_id("<|im_end|>") == base + 2
    assert kimi.token_id(f"<|reserved_token_{base + 200}|>") == base + 200
    assert kimi.token_id("no such token") is None
    # <think> is an ordinary added token: read in any text and shown.
    assert kimi.encode("<think>a") == [base + 3, ord("a")]
    assert kimi.decode([base, base + 3, ord("a"), base + 2, base + 100]) == "<think>a"
    assert kimi.decode([base, ord("a")], skip_special=False) == "[BOS]a"


def test_kimi_adds_bos_only_on_request(kimi: Tokenizer) -> None:
    assert kimi.encode("a") == [ord("a")]
    assert kimi.encode("a", add_bos=True) == [kimi.bos_id, ord("a")]


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_kimi_texts_survive_and_stream(kimi: Tokenizer, text: str) -> None:
    ids = kimi.encode(text)
    decoder = StreamDecoder(kimi)
    assert kimi.decode(ids) == text
    assert "".join(map(decoder.push, ids)) + decoder.finish() == text


@settings(max_examples=100, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_kimi_ids_stream_as_they_decode(kimi: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, kimi.vocab_size + 2) | st.integers(0, 255), max_size=20))
    decoder = StreamDecoder(kimi, skip_special=skip)
    assert "".join(map(decoder.push, ids)) + decoder.finish() == kimi.decode(ids, skip_special=skip)


@pytest.mark.parametrize("text", [" " * 120_000 + "x", "a" * 120_000, "\n" * 60_000 + " " * 60_000])
def test_kimi_takes_very_long_runs(kimi: Tokenizer, text: str) -> None:
    assert kimi.decode(kimi.encode(text)) == text


def test_a_tokenizer_that_does_not_match_is_refused(kimi: Tokenizer) -> None:
    require_match(kimi, kimi.vocab_size)
    with pytest.raises(TokenizerError, match=f"ids go up to {kimi.vocab_size - 1}.* has {kimi.vocab_size - 1} tokens"):
        require_match(kimi, kimi.vocab_size - 1)


def test_unusable_texts_and_ids_are_refused(kimi: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="lone surrogate at 1"):
        kimi.encode("a\ud800")
    with pytest.raises(TokenizerError, match="negative: -1"):
        kimi.decode([1, -1])


def test_folders_without_a_readable_tokenizer_are_explained(tmp_path: Path) -> None:
    assert not has_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"has no tokenizer: expected tokenizer\.json, tiktoken\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    assert has_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model is no SentencePiece model, or damaged"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not valid JSON"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", "{", "is not valid JSON"),
        ("tokenizer_config.json", "[]", "holds no JSON object but a list"),
        ("tokenizer_config.json", '{"bos_token": 3}', "tokenizer_config.json: bos_token must be a token's text, not 3"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}', "key 'x', which is no token id"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {"content": "new"}}}', "'new' the id 7"),
        ("tokenizer_config.json", '{"chat_template": [1]}', "chat_template must be a jinja template"),
        (
            "generation_config.json",
            '{"eos_token_id": "two"}',
            "eos_token_id must be a token id",
        ),
    ],
)
def test_damaged_settings_are_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    folders.llama3(tmp_path / "t")
    (tmp_path / "t" / file).write_text(content)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path / "t")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines, b"!!! 3"], "not a tiktoken file"),
        (lambda lines: [*lines, b"YQ=="], "not a tiktoken file"),
        (lambda lines: [line for line in lines if not line.endswith(b" 7")], "without gaps"),
        (lambda lines: lines[:100], "single bytes"),
        (lambda lines: [], "without gaps"),
    ],
)
def test_a_damaged_tiktoken_file_is_named(
    tmp_path: Path, tokenizer_folder: Folder, damage: Callable[[list[bytes]], list[bytes]], message: str
) -> None:
    shutil.copytree(tokenizer_folder("kimi"), tmp_path / "k")
    file = tmp_path / "k/tiktoken.model"
    file.write_bytes(b"\n".join(damage(file.read_bytes().splitlines())))
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path / "k")


def test_truncation_and_padding_in_tokenizer_json_do_not_apply(tmp_path: Path) -> None:
    folder = folders.qwen(tmp_path / "q")
    content = json.loads((folder / "tokenizer.json").read_text())
    expected = load_tokenizer(folder).encode("the whale swam on")
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(folder).encode("the whale swam on") == expected


def test_line_19_long_runs_are_cut_where_kimis_code_cuts_them_and_found_in_one_pass() -> None:
    from latentkv.text.tiktoken_backend import _cut_long_runs

    near = ("a" * 24_999 + " ") * 40  # from every character on, almost a run that is long enough
    assert list(_cut_long_runs(near)) == [near]
    text = "b " + "a" * 60_000 + " " * 25_001 + "c"
    assert list(_cut_long_runs(text)) == ["b " + "a" * 25_000, "a" * 25_000, "a" * 10_000 + " " * 25_000, " c"]
    assert list(_cut_long_runs("x" * 25_000)) == ["x" * 25_000]


def test_line_19_a_long_text_is_encoded_and_decoded_as_a_short_one_and_others_run_meanwhile() -> None:
    embedded = load_tokenizer(EMBEDDED_MODEL)
    text = "The sea, 1234567890! " * 3000
    seen: list[float] = []
    done = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        before = sys.getswitchinterval()
        sys.setswitchinterval(1000)  # nobody runs here but while a library lets go of the interpreter
        try:
            work = pool.submit(lambda: (embedded.encode("1234567890" * 10_000), done.set()))
            while not done.is_set():
                seen.append(0)
                done.wait(0.001)
        finally:
            sys.setswitchinterval(before)
    ids = work.result()[0]
    assert len(seen) > 3
    assert embedded.decode(ids) == "1234567890" * 10_000
    assert embedded.decode(embedded.encode(text)) == text
