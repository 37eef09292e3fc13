"""Every kind of structure as one Lark grammar, the language that llguidance compiles."""

import json
import re
from typing import Any

import llguidance

from latentkv.errors import RequestError
from latentkv.text.schema_keywords import require_enforced

# Between JSON's signs: nothing, a space, or a new line that is indented. More would let a model write blanks for ever.
_JSON_OPTIONS = {"whitespace_pattern": r"\n?[ \t]{0,40}"}
# All ways to cut a text into tokens are allowed, as the model chooses. Otherwise texts without a choice would be cut
# by the tokenizer outside of their context.
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'

# Strings, expressions and comments; those that do not end go to the end of the line, so that no text takes long.
_QUIET = re.compile(r'"(?:[^"\\\n]|\\.)*"?|/(?:[^/\\\n]|\\.)+/?|(?://|#)[^\n]*')
_UNHEARD = re.compile(r"\b(temperature|stop|stop_capture)\s*=")
_SPECIAL_TOKEN = re.compile(r"<(?!\[)[^<>\n]*>")
_INLINE_SCHEMA = re.compile(r"%json\s*(?={)")


def as_lark(kind: str, source: str) -> str:
    """The grammar of a structure.

    Args:
        kind: "json_schema", "regex" or "grammar".
        source: the structure's text, for a schema that of a JSON object.

    Raises:
        RequestError: it asks for something that would not be enforced.
    """
    match kind:
        case "json_schema":
            schema: dict[str, Any] = json.loads(source)
            require_enforced(schema)
            return f"start: %json {json.dumps({**schema, 'x-guidance': _JSON_OPTIONS})}{_OPTIONS}"
        case "regex":
            grammar: dict[str, Any] = json.loads(llguidance.LLMatcher.grammar_from_regex(source))
            return grammar["grammars"][0]["lark_grammar"] + _OPTIONS
        case _:
            _require_heard(source)
            return source + _OPTIONS


def _require_heard(grammar: str) -> None:
    words = _QUIET.sub("", grammar)
    option, token = _UNHEARD.search(words), _SPECIAL_TOKEN.search(words)
    if token:
        raise RequestError(f"The grammar names the special token {token[0][:100]}: write its number, as in <[128]>.")
    if option:
        raise RequestError(
            f"The grammar sets {option[1]}=, which is not supported: for a text's end use suffix= or lazy."
        )
    for inline in _INLINE_SCHEMA.finditer(grammar):
        try:
            schema, _ = json.JSONDecoder().raw_decode(grammar, inline.end())
        except (ValueError, RecursionError):
            continue  # inside a string, or for the compiler to complain about
        schema.pop("x-guidance", None)
        require_enforced(schema)
