"""Tokens become text: joined to the prompt as a reader expects, stop strings cut, whatever the tokenizer's decoder."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models

from latentkv.completion import Piece, TextOutput, joined
from latentkv.engine import Request, SamplingParams, TokenLogprobs
from latentkv.text import Tokenizer, load_tokenizer

PIECES = ["<unk>", "<s>", "▁the", "▁whale", "s", "▁sw", "am", "<0xC3>", "<0xAF>", "<0x0A>"]
SENTENCEPIECE = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
# Works on whole texts only, so that all text comes at the end.
WHOLE = decoders.Sequence([SENTENCEPIECE, decoders.Replace("never there", "")])


def tokenizer(folder: Path, decoder) -> Tokenizer:
    model = HuggingFaceTokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="<unk>"))
    model.decoder = decoder
    model.add_special_tokens(["<unk>", "<s>"])
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    return load_tokenizer(folder)


def pieces(words: str) -> list[int]:
    return [PIECES.index(word) for word in words.split()]


def text_of(tokenizer: Tokenizer, prompt: str, completion: str, stop: tuple[str, ...] = ()) -> list[str]:
    """What each token adds, and last what the end adds."""
    request = Request.create(pieces(prompt), SamplingParams(stop=stop), vocab_size=len(PIECES), max_context=99)
    output = TextOutput(tokenizer, request)
    parts = []
    for token in pieces(completion):
        stopped = output.push(token)
        parts.append(output.take())
        if stopped:
            break
    output.finish()
    return [*parts, output.take()]


def test_the_second_decoder_shows_nothing_before_the_end(tmp_path: Path):
    assert text_of(tokenizer(tmp_path, WHOLE), "<s>", "▁the s") == ["", "", "thes"]


@pytest.mark.parametrize("decoder", [SENTENCEPIECE, WHOLE], ids=["streaming", "whole"])
@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [
        ("<s>", "▁the ▁whale s", "the whales"),
        ("<s> ▁the", "▁whale s", " whales"),
        ("<s> ▁whale", "s ▁sw am", "s swam"),
        ("<s> ▁whale <0x0A>", "<0x0A> ▁the", "\n the"),
        ("<s> ▁the <0x0A>", "▁the", " the"),
    ],
)
def test_a_completion_goes_on_from_its_prompt(tmp_path: Path, decoder, prompt: str, completion: str, text: str):
    assert "".join(text_of(tokenizer(tmp_path, decoder), prompt, completion)) == text


def test_a_character_begun_by_the_prompt_is_completed(tmp_path: Path):
    assert "".join(text_of(tokenizer(tmp_path, SENTENCEPIECE), "▁the <0xC3>", "<0xAF> s")) == "ïs"


def test_text_comes_as_soon_as_it_is_certain(tmp_path: Path):
    model = tokenizer(tmp_path, SENTENCEPIECE)
    assert text_of(model, "<s> s", "▁the <0xC3> <0xAF> s") == [" the", "", "", "ïs", ""]


def test_a_stop_string_and_what_follows_are_cut_and_a_near_miss_is_not(tmp_path: Path):
    model = tokenizer(tmp_path, SENTENCEPIECE)
    assert text_of(model, "<s> s", "▁the ▁sw am ▁whale", stop=("swam",)) == [" the", " ", "", ""]
    assert text_of(model, "<s> s", "▁the ▁sw s", stop=("swam",)) == [" the", " ", "sw", "s"]
    assert text_of(model, "<s> s", "▁the ▁sw", stop=("swam",)) == [" the", " ", "sw"]
    assert "".join(text_of(tokenizer(tmp_path, WHOLE), "<s> s", "▁the ▁sw am", stop=("swam",))) == " the "


def test_pieces_that_follow_one_another_are_one_with_all_that_they_hold():
    first, second = TokenLogprobs(5, -0.5, {5: -0.5}), TokenLogprobs(6, -0.25, {6: -0.25})
    parts = [
        Piece("a", [5], [first], [second], None),
        Piece("", [6], [second]),
        Piece("b c", [7], [first], None, "stop"),
    ]
    assert joined(parts) == Piece("ab c", [5, 6, 7], [first, second, first], [second], "stop")
    assert joined([Piece("a", [5]), Piece("b", [6])]) == Piece("ab", [5, 6])
