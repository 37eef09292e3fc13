"""Regular expressions that published tokenizers cut and normalise text with, which are known to come to an end.

They are facts of those models, as their `tokenizer.json` has them, but for line ends: some files have these as
themselves and some as `\\r` and `\\n`, which means the same.
"""

from latentkv.text.bpe_trainer import PIECE_PATTERN as TRAINED_HERE

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES, _SPACES = r"\s*[\r\n]+", r"\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKED_WORD = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+"


def _cased_words(upper: str, lower: str, end: str) -> str:
    """Words that may change from upper to lower case once."""
    begin = r"[^\r\n\p{L}\p{N}]?"
    return f"{begin}{upper}*{lower}+{end}|{begin}{upper}+{lower}*{end}"


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_NO_HAN = r"&&[^\p{Han}]]"

QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SIGNS}[\r\n]*|{_LINES}|{_SPACES}"
TEKKEN = rf"{_cased_words(_UPPER, _LOWER, '')}|\p{{N}}|{_SIGNS}[\r\n/]*|{_LINES}|{_SPACES}"
# Han runs stand alone, as `tokenization_kimi.py` and `tokenization_moonshot.py` of the published repositories say
# (moonshotai/Kimi-K2-Instruct, moonshotai/Moonlight-16B-A3B).
KIMI = (
    r"[\p{Han}]+|"
    + _cased_words(_UPPER[:-1] + _NO_HAN, _LOWER[:-1] + _NO_HAN, _CONTRACTION + "?")
    + rf"|\p{{N}}{{1,3}}|{_SIGNS}[\r\n]*|{_LINES}|{_SPACES}"
)
_CASED = _cased_words(_UPPER, _LOWER, _CONTRACTION + "?")
# Letters as DeepSeek-V2 lists them.
_LETTERS = (
    "A-Za-z"
    "\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf"
    "\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d"
    "\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4"
    "\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_MARKS = "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~]"
_DEEPSEEK_V3 = rf"{_MARKS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"


LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}[\r\n]*|{_LINES}|{_SPACES}"
"""Llama 3's, GLM 4's and cl100k's."""

O200K = rf"{_CASED}|\p{{N}}{{1,3}}|{_SIGNS}[\r\n/]*|{_LINES}|{_SPACES}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
YOUTU = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    rf"{_CASED}|\p{{N}}|{_SIGNS}[\r\n/]*|{_LINES}|{_SPACES}",
)
"""One after the other, as those that follow."""

DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    rf"{_DEEPSEEK_V3}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}|{_SPACES}",
)
_DEEPSEEK_V2_WORDS = (
    r"[\r\n]",
    rf"\s?[{_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
)
_DEEPSEEK_V2_END = r"\s+$"
_DEEPSEEK_V2_REST = ("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}+")
DEEPSEEK_V2 = (*_DEEPSEEK_V2_WORDS, _DEEPSEEK_V2_END, *_DEEPSEEK_V2_REST)
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
"""llama.cpp's, for files that ask for no other; Falcon's with all of Unicode's punctuation."""


def _possessive(digits: str) -> str:
    word, signs = r"[^\r\n\p{L}\p{N}]?+\p{L}+", r" ?[^\s\p{L}\p{N}]++[\r\n]*"
    return rf"'(?i:[sdmt]|ll|ve|re)|{word}|{digits}|{signs}|\s*[\r\n]|{_SPACES}"


KNOWN_PATTERNS = frozenset(
    {
        TRAINED_HERE,
        QWEN2,
        TEKKEN,
        KIMI,
        # Llama 3, GLM 4, cl100k; StableLM, DBRX; Grok, Jais 2
        LLAMA3,
        rf"{_CONTRACTION}|{_WORD}|\p{{N}}+|{_SIGNS}[\r\n]*|{_LINES}|{_SPACES}",
        rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}|{_SPACES}",
        rf"{_CONTRACTION}|{_MARKED_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}|{_SPACES}",
        _possessive(r"\p{N}{1,3}"),
        _possessive(r"\p{N}"),
        # o200k; MiniMax; Youtu
        O200K,
        *YOUTU,
        # DeepSeek: V3 and Hunyuan; V2; Coder
        *DEEPSEEK_V3,
        rf"{_DEEPSEEK_V3}| ?[\p{{P}}\p{{S}}]+|[\r\n]|{_SPACES}",
        *_DEEPSEEK_V2_WORDS,
        *_DEEPSEEK_V2_REST,
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        # GPT-2, Falcon, Bloom, CLIP, digits of others
        GPT2,
        *DEFAULT,
        " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+",
        r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
        DIGIT,
        r"\d",
        r"(?:\r?\n)+(?!\r?\n)",
        ".",
        " ",
        # Normalizers of SentencePiece's kind
        " {2,}",
        r"\s+",
        r"\n",
        r"\s{2,}|[\n\r\t]",
        r"[\n\r\t]",
    }
)
"""Each takes time in proportion to the text."""

SLOW_PATTERNS = frozenset({_DEEPSEEK_V2_END})
"""Known too (DeepSeek-V2), and harmless to short texts: the time grows with the square of a run of spaces."""


def is_known(pattern: str) -> bool:
    """Whether a pattern takes time in proportion to the text."""
    return _with_written_line_ends(pattern) in KNOWN_PATTERNS


def is_slow(pattern: str) -> bool:
    """Whether a pattern is known, but takes long for long texts."""
    return _with_written_line_ends(pattern) in SLOW_PATTERNS


def _with_written_line_ends(pattern: str) -> str:
    return pattern.replace("\r", r"\r").replace("\n", r"\n")
