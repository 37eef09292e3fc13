import io
import itertools
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from latentkv.errors import TokenizerError
from latentkv.text import StreamDecoder, load_tokenizer
from latentkv.text.sentencepiece_backend import SentencePieceBackend
from latentkv.text.sentencepiece_model import read_sentencepiece_model
from latentkv.text.settings import TokenizerSettings

CORPUS = [
    "it was a dark night and the fox said hello world the whale swam on 12 34 aaaa aaa aa",
    "naïve café ① ｆｕｌｌ été привет мир ﬁne Ⅷ",
    "foo   bar  baz  def f():    return 1",
    "The whale! “quoted” don't x<sep>y 鲸鱼 中文",
] * 10
TEXTS = [
    *CORPUS[:4],
    "",
    " ",
    "  the  whale ",
    "<s>",
    "</s><unk><0x41>",
    "\t\n",
    "\x01",
    "ｶﾞ½Å e\u0301 \u00a8\u200b\u3000x",
    "🐋 鲸",
]
CHARACTERS = "abcde hw <>éｆ①½é가🐋\t\n\u3000\u00a8\u0301"
PIECES = st.sampled_from([*CHARACTERS, " the", "whale", "<s>", "<sep>", "<0x41>", "中文", "  "])


@cache
def trained(**options: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, minloglevel=2, hard_vocab_limit=False, **options
    )
    return model.getvalue()


def options(kind: str, rule: str, *, fallback: bool, dummy: bool, remove: bool, symbols: bool) -> dict[str, object]:
    chosen = {"user_defined_symbols": "<sep>,中文"} if symbols else {}
    return chosen | {
        "model_type": kind,
        "normalization_rule_name": rule,
        "byte_fallback": fallback,
        "add_dummy_prefix": dummy,
        "remove_extra_whitespaces": remove,
        "vocab_size": 420 if fallback else 160,
        "character_coverage": 0.995,
    }


# Every value of each option with every other option's, as the first, third and fourth columns pair them.
CASES = [
    options(kind, rule, fallback=fallback, dummy=dummy, remove=remove, symbols=symbols)
    for (kind, rule), (fallback, dummy, remove, symbols) in zip(
        itertools.cycle(itertools.product(("bpe", "unigram"), ("identity", "nmt_nfkc", "nfkc_cf"))),
        [
            (True, True, False, False),
            (False, True, True, True),
            (True, False, True, True),
            (False, False, False, True),
            (True, True, True, False),
            (False, True, False, True),
            (True, False, False, True),
            (True, True, True, True),
            (False, False, True, False),
        ],
        strict=False,
    )
]


def folder_of(root: Path, model: bytes, config: str = "{}") -> Path:
    root.mkdir(exist_ok=True)
    (root / "tokenizer.model").write_bytes(model)
    (root / "tokenizer_config.json").write_text(config)
    return root


@pytest.fixture(scope="module", params=range(len(CASES)))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SentencePieceBackend, sentencepiece.SentencePieceProcessor]:
    model = trained(**CASES[request.param])
    path = folder_of(tmp_path_factory.mktemp("sentencepiece"), model) / "tokenizer.model"
    ours = SentencePieceBackend(read_sentencepiece_model(path), TokenizerSettings())
    return ours, sentencepiece.SentencePieceProcessor(model_proto=model)


def check(ours: SentencePieceBackend, theirs: sentencepiece.SentencePieceProcessor, text: str) -> None:
    ids = theirs.encode(text)
    assert ours.encode(text, frame=False, allow_special=False) == ids
    if theirs.unk_id() not in ids:
        assert ours.decode(ids, skip_special=True) == theirs.decode(ids)


def test_texts_become_the_pieces_of_sentencepiece(pair) -> None:
    for text in TEXTS:
        check(*pair, text)
    ours, theirs = pair
    assert ours.vocab_size == theirs.vocab_size()
    assert [ours.piece(i) for i in range(ours.vocab_size)] == [theirs.id_to_piece(i) for i in range(ours.vocab_size)]


@settings(max_examples=40, deadline=None)
@given(text=st.lists(PIECES, max_size=16).map("".join))
def test_any_text_becomes_the_pieces_of_sentencepiece(pair, text: str) -> None:
    check(*pair, text)


def llama(tmp_path: Path, config: str = "{}"):
    model = trained(**CASES[0])
    return load_tokenizer(folder_of(tmp_path, model, config)), sentencepiece.SentencePieceProcessor(model_proto=model)


def test_special_tokens_are_read_only_where_they_are_allowed(tmp_path: Path) -> None:
    ours, theirs = llama(tmp_path)
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_id(), {theirs.eos_id()})
    assert ours.encode("<s>the", add_bos=False) == theirs.encode("<s>the")
    # What follows a special token begins no text: there is no space before it.
    after = theirs.encode("the")
    assert ours.encode("the</s>", add_bos=False, allow_special=True) == [*after, theirs.eos_id()]
    assert ours.encode("<s> the", add_bos=False, allow_special=True) == [theirs.bos_id(), *after]


def test_legacy_takes_each_part_for_the_beginning_of_a_text(tmp_path: Path) -> None:
    ours, theirs = llama(tmp_path, '{"legacy": true}')
    assert ours.encode("<s>the", add_bos=False, allow_special=True) == [theirs.bos_id(), *theirs.encode("the")]


def test_bos_and_eos_are_put_around_a_text_where_the_settings_ask(tmp_path: Path) -> None:
    ours, theirs = llama(tmp_path, '{"add_bos_token": true, "add_eos_token": true}')
    assert ours.encode("the") == [theirs.bos_id(), *theirs.encode("the"), theirs.eos_id()]
    assert llama(tmp_path)[0].encode("the") == theirs.encode("the")


def test_pieces_stream_as_they_decode(tmp_path: Path) -> None:
    ours, _ = llama(tmp_path)
    ids = ours.encode("  the 🐋 whale\n鲸")
    stream = StreamDecoder(ours)
    assert "".join(map(stream.push, ids)) + stream.finish() == ours.decode(ids) == "  the 🐋 whale\n鲸"


def test_added_tokens_follow_the_pieces_or_take_the_place_of_one(tmp_path: Path) -> None:
    size = llama(tmp_path)[1].vocab_size()
    (tmp_path / "added_tokens.json").write_text(f'{{"<|end|>": {size}, "<note>": {size + 1}}}')
    ours, theirs = llama(tmp_path, '{"eos_token": "<|end|>"}')
    assert (ours.eos_ids, ours.vocab_size) == ({size}, size + 2)
    assert ours.encode("the<|end|>", allow_special=True) == [*theirs.encode("the"), size]
    assert ours.encode("the<note>") == [*theirs.encode("the"), size + 1]
    (tmp_path / "added_tokens.json").write_text(f'{{"<|end|>": {size + 7}}}')
    with pytest.raises(TokenizerError, match=rf"added_tokens.json gives .* the id {size + 7}, and {size} is the next"):
        llama(tmp_path)


def test_an_added_token_takes_spaces_along_where_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained(**CASES[0]))
    model = read_sentencepiece_model(tmp_path / "tokenizer.model")
    size = len(model.pieces)
    added = {size: AddedToken("<end>", special=True, rstrip=True)}
    backend = SentencePieceBackend(model, TokenizerSettings(added_tokens=added))
    assert backend.encode("<end>  \n", frame=False, allow_special=True) == [size]


def test_line_22_a_token_that_takes_spaces_along_is_not_looked_for_from_each_of_them(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained(**CASES[0]))
    model = read_sentencepiece_model(tmp_path / "tokenizer.model")
    size = len(model.pieces)
    added = {size: AddedToken("<mask>", special=True, lstrip=True, rstrip=True)}
    backend = SentencePieceBackend(model, TokenizerSettings(added_tokens=added))
    spaces = " \n" * 100_000  # 10^10 steps, if it were
    whale = backend.encode("whale", frame=False, allow_special=True)
    assert backend.encode(f"whale{spaces}<mask>{spaces}", frame=False, allow_special=True) == [*whale, size]
    assert backend.encode(f"<mask>{spaces}whale", frame=False, allow_special=True)[0] == size
    assert size not in backend.encode(f"{spaces}whale", frame=False, allow_special=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        (b'{"model": {}}', "holds JSON"),
        (b"<!DOCTYPE html>", "holds HTML"),
        (b"IQ== 0\nIg== 1\n", "tiktoken file"),
        (b"\x0a\x0e", "ends in the middle of a field"),
        (b"\x0f\x00", "unknown kind 7"),
        (b"\xff" * 11, "a number has no end"),
        (b"\x0a\x05\x0a\x03<s>" * 2, "comes twice"),
        (b"\x0a\x05\x0a\x03<s>", "one piece for what is unknown"),
        (b"\x0a\x07\x0a\x05<unk>\x12\x02\x18\x04", "type character"),
        (b"\x0a\x0c\x0a\x05<unk>\x15\x00\x00\xc0\x7f", "score is no number"),
        (b"\x0a\x03\x0a\x01\xff", "no UTF-8"),
    ],
)
def test_what_is_no_sentencepiece_model_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


def test_every_truncation_is_one_sentence_or_a_whole_model(tmp_path: Path) -> None:
    model = trained(**CASES[0])
    for cut in range(1, len(model), 97):
        (tmp_path / "tokenizer.model").write_bytes(model[:cut])
        try:
            load_tokenizer(tmp_path).encode("the")
        except TokenizerError as error:
            assert "tokenizer.model" in str(error)
