"""A vocabulary that shows where a text was cut: each piece of these texts becomes one token of up to 24 bytes."""

from functools import cache

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
