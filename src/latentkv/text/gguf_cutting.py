"""How the tokenizers that GGUF files name by `tokenizer.ggml.pre` cut a text before it is merged.

The names are llama.cpp's. The patterns are those of the models' own tokenizers, of which llama.cpp's are a rendering
for an engine with fewer features.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from tokenizers import Regex, pre_tokenizers

from latentkv.errors import TokenizerError
from latentkv.text.known_patterns import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEFAULT,
    DIGIT,
    GPT2,
    KIMI,
    LLAMA3,
    O200K,
    QWEN2,
    TEKKEN,
    YOUTU,
)


@dataclass(frozen=True)
class Cutting:
    """What one name means.

    Attributes:
        patterns: a text is cut by each in turn.
        whole_pieces: a piece that is a token is that token, whatever its merges lead to.
        ranked: what the tokens are says all merges, as in tiktoken's files; those of the GGUF file are a part of them.
        nfc: texts are composed first, as the models' own tokenizers do and llama.cpp does not.
        add_bos: texts begin with BOS where the file does not say.
    """

    patterns: tuple[str, ...]
    whole_pieces: bool = False
    ranked: bool = False
    nfc: bool = False
    add_bos: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """The same for the `tokenizers` library."""
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_GPT2, _O200K = Cutting((GPT2,)), Cutting((O200K,))
_LLAMA3 = Cutting((LLAMA3,), whole_pieces=True, add_bos=True)
_CUTTINGS = {
    "default": Cutting(DEFAULT),
    "gpt-2": _GPT2,
    "gigachat": _GPT2,
    "smollm": Cutting((DIGIT, GPT2)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "glm4": Cutting((LLAMA3,), whole_pieces=True),
    "chatglm-bpe": Cutting((LLAMA3,)),
    "qwen2": Cutting((QWEN2,), nfc=True),
    "deepseek-r1-qwen": Cutting((QWEN2,)),
    "deepseek-llm": Cutting(DEEPSEEK_V2),
    "deepseek-v3": Cutting(DEEPSEEK_V3),
    "kimi-k2": Cutting((KIMI,), whole_pieces=True, ranked=True),
    "youtu": Cutting(YOUTU, whole_pieces=True),
    "tekken": Cutting((TEKKEN,), whole_pieces=True, add_bos=True),
    "kanana2": _O200K,
    "gpt-4o": _O200K,
}


def cutting_of(name: str) -> Cutting:
    """How a text is cut under the name in `tokenizer.ggml.pre`.

    Raises:
        TokenizerError: the name is not known; one way taken for another costs more than it is worth.
    """
    if name not in _CUTTINGS:
        raise TokenizerError(
            f"The GGUF file's tokenizer cuts texts in the way {name!r:.60}, which is not known here; known: "
            f"{', '.join(_CUTTINGS)}."
        )
    return _CUTTINGS[name]


def name_of_cutting(pre_tokenizer: Any, normalizer: Any, *, whole_pieces: bool, merges_digits: bool) -> str | None:
    """The name of the way in which a `tokenizer.json` cuts texts; None where it has none.

    Args:
        pre_tokenizer: as the file has it.
        normalizer: likewise.
        whole_pieces: as of `Cutting`; the file's `ignore_merges`.
        merges_digits: whether a token holds two digits beside one another; where none does, runs of them and single
            ones are cut to the same tokens.
    """
    patterns = tuple(_patterns(pre_tokenizer))
    nfc = [kind for kind in _kinds(normalizer) if kind != "Sequence"]
    if not patterns or None in patterns or nfc not in ([], ["NFC"]):
        return None

    def written(parts: tuple[str | None, ...]) -> tuple[str, ...]:
        texts = (str(part).replace("\r", r"\r").replace("\n", r"\n") for part in parts)
        return tuple(DIGIT if text == r"\p{N}+" and not merges_digits else text for text in texts)

    for name, cutting in _CUTTINGS.items():
        if (cutting.whole_pieces, cutting.nfc) != (whole_pieces, bool(nfc)) or cutting.ranked:
            continue
        if written(cutting.patterns) == written(patterns):
            return name
    return None


def _patterns(step: Any) -> Iterator[str | None]:
    """The patterns that a pre-tokenizer cuts by, in turn; None for what is something else."""
    described = cast("dict[str, Any]", step) if isinstance(step, dict) else {}
    match described.get("type"):
        case "Sequence":
            for each in cast("list[Any]", described.get("pretokenizers", [])):
                yield from _patterns(each)
        case "Split":
            found = cast("dict[str, Any]", described.get("pattern") or {})
            is_plain = described.get("behavior") == "Isolated" and not described.get("invert")
            yield found.get("Regex") if is_plain else None
        case "Digits":
            yield DIGIT if described.get("individual_digits") else None
        case "ByteLevel":
            if described.get("add_prefix_space"):
                yield None
            elif described.get("use_regex", True):
                yield GPT2
        case _:
            yield None


def _kinds(step: Any) -> Iterator[str]:
    if isinstance(step, dict):
        described = cast("dict[str, Any]", step)
        yield str(described.get("type"))
        for each in cast("list[Any]", described.get("normalizers", [])):
            yield from _kinds(each)
