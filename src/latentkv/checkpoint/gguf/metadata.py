"""Values of a GGUF file's metadata, read by their kind: what is missing or something else is one sentence."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, cast

from latentkv.errors import CheckpointError, LatentKVError
from latentkv.token_ids import NO_TOKEN

_MOST = 1e30
_NO_TOKEN_UNSIGNED = 2**32 - 1
# What llama.cpp takes a SentencePiece vocabulary's tokens for where the file names none.
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}
_END_NAMES = ("eos", "eot", "eom")


class Metadata:
    """The keys of one GGUF file, and those of its architecture by their short names.

    Args:
        values: plain Python values by key, arrays as lists.
        error: the type of what is raised.

    Raises:
        LatentKVError: of type `error`, wherever a value is missing or of another kind; the sentence names the key.
    """

    def __init__(self, values: Mapping[str, Any], error: type[LatentKVError] = CheckpointError) -> None:
        self._values = values
        self._error = error

    @property
    def architecture(self) -> str:
        """What kind of model it is, such as "deepseek2"."""
        return self.text("general.architecture")

    def has(self, key: str) -> bool:
        """Whether there is such a key."""
        return self._full(key) in self._values

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 0. One for each layer will do where all are the same."""
        value = self._get(key, default)
        if isinstance(value, list) and value and value.count(value[0]) == len(cast("list[Any]", value)):
            value = value[0]
        if type(value) is not int or value < 0:
            raise self._wrong(key, "a whole number of at least 0", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number, as it was written before it was rounded to float32."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not -_MOST < value < _MOST:
            raise self._wrong(key, "a finite number", value)
        return as_written(float(value))

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A text."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a text", value)
        return value

    def array(self, key: str, kind: type | tuple[type, ...]) -> list[Any]:
        """A list whose items are all of one kind."""
        value = self._get(key, None)
        if not isinstance(value, list):
            raise self._wrong(key, "a list", value)
        items = cast("list[Any]", value)
        for place, item in enumerate(items):
            if not isinstance(item, kind) or isinstance(item, bool):
                raise self._wrong(f"{key}[{place}]", _kinds(kind), item)
        return items

    def token_id(self, name: str) -> int | None:
        """The id of the token "bos", "eos", "eot", "eom", "unknown" or "padding"; None where there is none.

        Whether it is inside the vocabulary is for those to check who know the vocabulary.
        """
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in self._values:
            is_sentencepiece = self._values.get("tokenizer.ggml.model") == "llama"
            return _SENTENCEPIECE_IDS.get(name) if is_sentencepiece else None
        value = self._values[key]
        if type(value) is not int:
            raise self._wrong(key, "a token id, a whole number", value)
        return None if value in (NO_TOKEN, _NO_TOKEN_UNSIGNED) else value

    def end_ids(self) -> list[int]:
        """The ids that end a text: of the text itself, of a turn, of a message."""
        found = (self.token_id(name) for name in _END_NAMES)
        return list(dict.fromkeys(token for token in found if token is not None))

    def _full(self, key: str) -> str:
        first = key.partition(".")[0]
        return key if first in ("general", "tokenizer") else f"{self.architecture}.{key}"

    def _get(self, key: str, default: Any) -> Any:
        full = self._full(key)
        if full in self._values:
            return self._values[full]
        if default is None:
            raise self._error(f"The GGUF file's metadata lack {full}: download it again, or convert the model anew.")
        return default

    def _wrong(self, key: str, expected: str, value: Any) -> LatentKVError:
        text = repr(value)
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        return self._error(f"The GGUF file's metadata: {self._full(key)} must be {expected}, not {shown}.")


def as_written(value: float) -> float:
    """The shortest decimal that is this number in float32: 1e-05 for 9.999999747378752e-06."""
    try:
        stored = struct.pack("<f", value)
        if struct.unpack("<f", stored)[0] != value:
            return value  # was stored in float64
    except OverflowError:
        return value
    shortened = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    return next((short for short in shortened if struct.pack("<f", short) == stored), value)


def _kinds(kind: type | tuple[type, ...]) -> str:
    names = {str: "a text", int: "a whole number", float: "a number"}
    return names.get(kind[-1] if isinstance(kind, tuple) else kind, "something else")
