"""Vocabularies as GGUF's metadata: one that shows where a text was cut, and one that SentencePiece has trained.

Of the first each piece of the texts becomes one token of up to 24 bytes.
"""

import io
from functools import cache

import sentencepiece

from latentkv.text.decoders import BYTE_CHARACTERS

TEXTS = [
    "I'LL say it's 1234567 (or 3.14)...",
    '  the  man\t\n\n said:\r\n "No!"  ',
    "HTMLParser camelCase iPhone's",
    "中文字 and かな, 한국어ㄱㅎ ㄅㄆ。“q”…",
    "naïve e\u0301te\u0301 नमस् Привет!!",
    "//note\n/* $x += y_2; */ ~|`^ <=>",
    "１２ ½ Ⅷ \u3000\u00a0x 🐋👍🏽 end   ",
    "[word] #tag @me -the- a.b,c;d (the)",
]
_LONGEST = 24


def metadata(pre, **others):
    tokens, merges = vocabulary()
    named = {f"tokenizer.ggml.{key}": value for key, value in others.items()}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(tokens) - 2)],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    } | named


@cache
def vocabulary():
    """Merges in an order that lets a piece grow from its first byte on."""
    tokens, merges = dict.fromkeys(["<s>", "</s>", *BYTE_CHARACTERS.values()]), {}
    for text in TEXTS:
        written = "".join(BYTE_CHARACTERS[byte] for byte in text.encode())
        for start in range(len(written)):
            for end in range(start + 2, min(start + _LONGEST, len(written)) + 1):
                tokens[written[start:end]] = None
                merges[f"{written[start : end - 1]} {written[end - 1]}"] = None
    return list(tokens), list(merges)


SENTENCES = [
    "it was a dark night and the fox said hello world the whale swam on 12 34 aaaa aaa aa",
    "naïve café été привет мир foo   bar  baz  def f():    return 1",
    "The whale! “quoted” don't x<sep>y 鲸鱼 中文",
] * 8


@cache
def trained():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        minloglevel=2,
        hard_vocab_limit=False,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols="<sep>",
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def scored(**others):
    """As llama.cpp's converter writes a SentencePiece model."""
    model = trained()
    ids = range(len(model))
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3, "<sep>": 4}
    texts = [model.id_to_piece(i) for i in ids]
    named = {
        "model": "llama",
        "pre": "default",
        "tokens": texts,
        "scores": [model.get_score(i) for i in ids],
        "token_type": [6 if model.is_byte(i) else kinds.get(texts[i], 1) for i in ids],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (named | others).items() if value is not None}
