"""`GrammarCompiler`: structures as constraints over a checkpoint's own tokens, by llguidance.

A grammar comes from strangers. It is first compiled by a process of its own that may take so much time, memory and
stack; only what passes is compiled here, where a crash would be everybody's.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Collection

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from latentkv.errors import RequestError
from latentkv.text.digit_limit import DigitLimit, NumberState
from latentkv.text.grammar_process import PARSER_LIMITS, grammar_processes
from latentkv.text.lark import as_lark
from latentkv.text.token_bytes import token_bytes
from latentkv.text.tokenizer import Tokenizer

MAX_CACHED = 64
MAX_CACHED_BYTES = 256 << 20

_COMPILATIONS_AT_ONCE = 2
_NAMES = {"json_schema": "JSON schema", "regex": "regular expression", "grammar": "grammar"}


class GrammarCompiler:
    """Compiles structures for one tokenizer, and keeps the compiled. Use it from any thread; it keeps none waiting.

    Args:
        tokenizer: whose tokens the model writes.
        vocab_size: of the model, V; ids that the tokenizer does not have are never allowed.
        end_ids: tokens that end a text, and are never a part of one.

    Raises:
        TokenizerError: the tokenizer's tokens stand for no text of their own.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Collection[int]) -> None:
        tokens = [b"" if i in end_ids else content for i, content in enumerate(token_bytes(tokenizer))]
        tokens += [b""] * (vocab_size - len(tokens))
        # Not only those with bytes: a grammar may name special tokens by their numbers, but no others.
        self._tokens = np.array([i not in end_ids and tokenizer.piece(i) is not None for i in range(vocab_size)])
        self._digits = DigitLimit(tokens)
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(tokens)))
        self._slots = threading.BoundedSemaphore(_COMPILATIONS_AT_ONCE)
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[str, str], tuple[Grammar, int]] = OrderedDict()

    def compile(self, kind: str, source: str) -> Grammar:
        """The constraint that a structure is.

        Args:
            kind: "json_schema", "regex" or "grammar".
            source: its text; of a schema, the text of a JSON object.

        Raises:
            RequestError: it is malformed, asks for what cannot be enforced, allows no text, or is too much work.
        """
        grammar = self._cached(kind, source)
        if grammar is None:
            with self._slots:
                grammar = self._cached(kind, source) or self._compile(kind, source)
        return grammar

    def _cached(self, kind: str, source: str) -> Grammar | None:
        with self._lock:
            entry = self._cache.get((kind, source))
            if entry is None or entry[0].worn:
                return None
            self._cache.move_to_end((kind, source))
            return entry[0]

    def _compile(self, kind: str, source: str) -> Grammar:
        lark, name = as_lark(kind, source), _NAMES[kind]
        # Many tokens take their time, and only a grammar that asks for them by number needs to know how many there are.
        error, num_bytes = grammar_processes().try_out(lark, name, len(self._tokens) if "<[" in lark else 0)
        if error:
            raise RequestError(f"The {name} cannot be used: {_reason(error, kind)}.")
        matcher = LLMatcher(self._tokenizer, lark, log_level=0, limits=LLParserLimits(**PARSER_LIMITS))
        grammar = Grammar(matcher, self._tokens, self._digits if kind == "json_schema" else None)
        if not grammar.start().allowed.any():
            reason = _reason(matcher.get_error(), kind) or "change it"
            raise RequestError(f"The {name} allows no text that this tokenizer can write: {reason}.")
        self._keep((kind, source), grammar, num_bytes)
        return grammar

    def _keep(self, key: tuple[str, str], grammar: Grammar, num_bytes: int) -> None:
        with self._lock:
            self._cache[key] = grammar, num_bytes
            self._cache.move_to_end(key)
            while len(self._cache) > MAX_CACHED or sum(size for _, size in self._cache.values()) > MAX_CACHED_BYTES:
                self._cache.popitem(last=False)


class Grammar:
    """A compiled structure; what `latentkv.engine` calls a constraint.

    Args:
        matcher: at the beginning of a text.
        tokens: [V] those that a text may hold at all.
        digits: of a text that is JSON: how long its numbers may grow.

    Attributes:
        worn: a completion has used up what its states may take; the next one needs a freshly compiled grammar.
    """

    def __init__(self, matcher: LLMatcher, tokens: NDArray[np.bool_], digits: DigitLimit | None = None) -> None:
        self.worn = False
        self.digits = digits
        self._tokens = tokens
        self._matcher = matcher
        self._first = self.allowed_by(matcher)

    def start(self) -> GrammarState:
        """The state of a completion without tokens."""
        return GrammarState(self, self._matcher.deep_copy(), self._first)

    def allowed_by(self, matcher: LLMatcher) -> NDArray[np.bool_]:
        """[V] tokens of text that a matcher takes next; none after an error."""
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, count=len(self._tokens), bitorder="little").view(np.bool_) & self._tokens


class GrammarState:
    """Where one completion stands in a grammar.

    Attributes:
        allowed: [V] tokens that may come next; no end token is among them.
    """

    def __init__(self, grammar: Grammar, matcher: LLMatcher, allowed: NDArray[np.bool_]) -> None:
        self.allowed = allowed
        self._grammar = grammar
        self._matcher = matcher
        self._number = NumberState()

    @property
    def may_end(self) -> bool:
        """Whether the tokens so far are a whole text."""
        return self._matcher.is_accepting()

    def accept(self, token_id: int) -> bool:
        """Take an allowed token; False when no token may follow it."""
        self._matcher.consume_token(token_id)
        self.allowed = self._grammar.allowed_by(self._matcher)
        if (digits := self._grammar.digits) is not None:
            digits.follow(self._number, token_id)
            self.allowed = digits.within(self._number, self.allowed, may_end=self.may_end)
        if self._matcher.is_error():
            self._grammar.worn = True
        return bool(self.allowed.any())


class _Vocabulary:
    """Tokens as llguidance asks for them. The end is one of its own, after the model's."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = [*tokens, b""]
        self.eos_token_id = len(tokens)
        self.special_token_ids: list[int] = []

    def __call__(self, text: bytes) -> list[int]:
        return []  # it would be asked to cut forced text into tokens, and none is forced


def _reason(error: str, kind: str) -> str:
    """One line of llguidance's explanation, without its place in a grammar that the user has not written."""
    lines = error.replace("<non-verbose/>", "").strip().splitlines()
    line = next((line for line in lines if line.startswith("error: ")), lines[0] if lines else "")
    if line.startswith("NoExtension"):
        return "no text follows it"
    if "coerce_one_of" in line:  # an option of the compiler's, which nobody here can set
        return "of a oneOf more than one schema might hold, which cannot be ruled out; use anyOf"
    if kind != "grammar":
        line = re.sub(r"^at \d+\(\d+\): |failed to compile JSON schema: ", "", line)
    return line.removeprefix("error: ")[:200].rstrip(" .")
