"""`SamplingParams`: how the next token is chosen and when a completion ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, cast

from latentkv.errors import RequestError
from latentkv.option_types import Flag
from latentkv.structure import Structure

MAX_SEED = 2**63 - 1
MAX_BIASES = 1024
MAX_CHOICES = 128


@dataclass(frozen=True)
class Choice:
    """What decides how a token is chosen among the likely ones, where a request and its model leave it open.

    Attributes:
        temperature: what logits are divided by.
        top_k: number of likeliest tokens that are kept; 0 keeps all.
        top_p: probability up to which the likeliest tokens are kept.
        min_p: how many times as likely as the likeliest a token must be to be kept.
        repetition_penalty: how much less likely tokens of prompt and text become; 1 changes nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks of the sampler; every value is checked once, here.

    The model's default, where a value is None, is what its `generation_config.json` says, else what changes nothing
    (`Choice`).

    Attributes:
        max_tokens: new tokens at most (1 or more); clipped to what the context still holds.
        temperature: what logits are divided by, up to 100; 0 is greedy; None is the model's default.
        top_k: keep the k most likely tokens; 0 keeps all; None is the model's default.
        top_p: keep the smallest set of most likely tokens whose probability reaches this, in (0, 1]; 1 keeps all; None
            is the model's default.
        min_p: keep tokens at least this times as likely as the likeliest, in [0, 1]; 0 keeps all; None is the model's
            default.
        stop: text that ends the answer, which is cut before it; one, or several.
        stop_token_ids: token that ends the answer, besides the model's own; one, or several.
        ignore_eos: do not end at the model's own end tokens (`stop_token_ids` still end it).
        seed: same seed, same text; None is a fresh one, reported in the completion.
        logprobs: report each token's log-probability and those of this many likeliest tokens; None is no report.
        prompt_logprobs: report those of the prompt's tokens too, but the first; the whole prompt is read for it, even
            what the cache knows.
        repetition_penalty: how much less likely tokens of the prompt and of the text so far become, in (0, 100]; below
            1 more likely, 1 changes nothing (CTRL, arXiv 1909.05858); None is the model's default.
        presence_penalty: what is subtracted from the logits of tokens that the text so far holds, in [-2, 2].
        frequency_penalty: what is subtracted once for each time that the text so far holds a token, in [-2, 2].
        logit_bias: what is added to the logits of these token ids, each in [-100, 100]; at most 1,024 of them.
        n: completions of the prompt, each with noise of its own: completion i has the seed `seed + i`; 1 to 128.
        best_of: completions that are made, of which the n likeliest a token are returned; None is n, at most 128.
        min_tokens: new tokens before the completion may end by an end token, at most `max_tokens`.
        structure: the form that the text must have, None for any. A text that is complete ends with "stop"; one that
            is cut short by `max_tokens`, or that no token can complete, with "length".

    Raises:
        RequestError: a value has the wrong type or is out of range; the message names it and the range.
    """

    max_tokens: Annotated[int, Flag(("--max-tokens", "-n"))] = 256
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float], hash=False)
    min_tokens: int = 0
    n: int = 1
    best_of: int | None = None
    structure: Structure | None = None

    def __post_init__(self) -> None:
        _require_int("max_tokens", self.max_tokens, low=1)
        choice = self.choice
        _require_number("temperature", choice.temperature, low=0, high=100)
        _require_int("top_k", choice.top_k, low=0, note=" (0: keep all)")
        _require_number("top_p", choice.top_p, low=0, high=1, above_low=True)
        _require_number("min_p", choice.min_p, low=0, high=1)
        _require_number("repetition_penalty", choice.repetition_penalty, low=0, high=100, above_low=True)
        _require_number("presence_penalty", self.presence_penalty, low=-2, high=2)
        _require_number("frequency_penalty", self.frequency_penalty, low=-2, high=2)
        _require_int("min_tokens", self.min_tokens, low=0, high=self.max_tokens, note=" (max_tokens)")
        _require_int("n", self.n, low=1, high=MAX_CHOICES)
        if self.best_of is not None:
            _require_int("best_of", self.best_of, low=self.n, high=MAX_CHOICES, note=" (from n on)")
        if self.seed is not None:
            _require_int("seed", self.seed, low=0, high=MAX_SEED)
        for name, asked in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if asked is not None:
                _require_int(name, asked, low=0)
        if type(self.ignore_eos) is not bool:
            raise _refused("ignore_eos", self.ignore_eos, "True or False")
        if self.structure is not None and not isinstance(cast(object, self.structure), Structure):
            raise _refused("structure", self.structure, "a Structure, like Structure.regex('[0-9]+'), or None")
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    @property
    def num_choices(self) -> int:
        """Completions that are made."""
        return self.best_of or self.n

    @cached_property
    def choice(self) -> Choice:
        """How a token is chosen."""
        return Choice(**{name: value for name in vars(Choice()) if (value := getattr(self, name)) is not None})

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without chance."""
        return self.choice.temperature == 0

    def with_defaults(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """These parameters, and those of `defaults`, by name, that are None here.

        Raises:
            RequestError: a default is out of range.
        """
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return replace(self, **missing) if missing else self


def _require_int(name: str, value: object, *, low: int, high: int | None = None, note: str = "") -> None:
    if type(value) is not int or value < low or (high is not None and value > high):
        upper = "or more" if high is None else f"to {high}"
        raise _refused(name, value, f"an integer, {low} {upper}{note}")


def _require_number(name: str, value: object, *, low: float, high: float, above_low: bool = False) -> None:
    known = type(value) in (int, float) and math.isfinite(cast(float, value))
    if not known or not low <= cast(float, value) <= high or (above_low and value == low):
        raise _refused(name, value, f"a number {'above' if above_low else 'from'} {low} {'up ' * above_low}to {high}")


def _stop_strings(value: object) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else _as_tuple("stop", value, "a string or a list of strings")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise _refused("stop", value, "strings that are not empty")
    return cast("tuple[str, ...]", strings)


def _token_ids(value: object) -> tuple[int, ...]:
    ids = _as_tuple("stop_token_ids", value, "a list of token ids")
    for token in ids:
        if type(token) is not int or token < 0:
            raise _refused("stop_token_ids", value, "token ids, integers of 0 or more")
    return cast("tuple[int, ...]", ids)


def _biases(value: object) -> dict[int, float]:
    allowed = f"at most {MAX_BIASES} token ids of 0 or more, each with a number from -100 to 100"
    if not isinstance(value, Mapping) or len(cast("Mapping[object, object]", value)) > MAX_BIASES:
        raise _refused("logit_bias", value, allowed)
    for token, bias in cast("Mapping[object, object]", value).items():
        number = type(bias) in (int, float) and -100 <= cast(float, bias) <= 100
        if type(token) is not int or token < 0 or not number:
            raise _refused("logit_bias", value, allowed)
    return dict(cast("Mapping[int, float]", value))


def _as_tuple(name: str, value: object, allowed: str) -> tuple[object, ...]:
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
        raise _refused(name, value, allowed)
    return tuple(cast("Iterable[object]", value))


def _refused(name: str, value: object, allowed: str) -> RequestError:
    return RequestError(f"{name}={value!r} is not allowed: it must be {allowed}.")
