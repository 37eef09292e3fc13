"""Every kind of structure as one Lark grammar, the language that llguidance compiles."""

import json
import re
from typing import Any

import llguidance

from latentkv.errors import RequestError
from latentkv.text.schema_keywords import require_enforced, without_idle_words

_JSON_OPTIONS = {
    # Between JSON's signs: nothing, a space, or a new line that is indented. With more, a model
    # may write blanks for ever.
    "whitespace_pattern": r" |\n[ \t]{0,40}",
    # No \uXXXX: that would be a way to write a key that the schema describes as one that it does not know.
    "json_allowed_escapes": 'nrbtf\\"',
}
# All ways to cut a text into tokens are allowed, as the model chooses. Otherwise texts without a choice would be cut
# by the tokenizer outside of their context.
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'

# Strings, expressions and comments; those that do not end go to the end of the line, so that no text takes long.
_QUIET = r'"(?:[^"\\\n]|\\.)*"?|/(?:[^/\\\n]|\\.)+/?|(?://|#)[^\n]*'
_UNHEARD = re.compile(r"\b(temperature|stop|stop_capture)\s*=")
_MAX_BROKEN = 64
_SPECIAL_TOKEN = re.compile(r"<(?!\[)[^<>\n]*>")
_INLINE_SCHEMA = re.compile(rf"{_QUIET}|(?P<schema>%json\s*{{)")


def as_lark(kind: str, source: str) -> str:
    """The grammar of a structure.

    Args:
        kind: "json_schema", "regex" or "grammar".
        source: the structure's text, for a schema that of a JSON object.

    Raises:
        RequestError: it asks for something that would not be enforced.
    """
    try:
        return _AS_LARK[kind](source) + _OPTIONS
    except RecursionError:
        raise RequestError(f"The {kind} nests too deeply: simplify it.") from None


def _from_schema(source: str) -> str:
    schema: dict[str, Any] = without_idle_words(json.loads(source))
    require_enforced(schema)
    return f"start: %json {json.dumps({**schema, 'x-guidance': _JSON_OPTIONS})}"


def _from_regex(source: str) -> str:
    grammar: dict[str, Any] = json.loads(llguidance.LLMatcher.grammar_from_regex(source))
    return grammar["grammars"][0]["lark_grammar"]


def _from_grammar(source: str) -> str:
    _require_heard(source)
    return _with_checked_schemas(source)


_AS_LARK = {"json_schema": _from_schema, "regex": _from_regex, "grammar": _from_grammar}


def _require_heard(grammar: str) -> None:
    words = re.sub(_QUIET, "", grammar)
    option, token = _UNHEARD.search(words), _SPECIAL_TOKEN.search(words)
    if token:
        raise RequestError(f"The grammar names the special token {token[0][:100]}: write its number, as in <[128]>.")
    if option:
        raise RequestError(
            f"The grammar sets {option[1]}=, which is not supported: for a text's end use suffix= or lazy."
        )


def _with_checked_schemas(grammar: str) -> str:
    """A grammar whose inline schemas are known to be enforced, with our options where they set none."""
    parts: list[str] = []
    done = broken = 0
    for inline in _INLINE_SCHEMA.finditer(grammar):
        if not inline["schema"]:
            continue
        try:
            schema, end = json.JSONDecoder().raw_decode(grammar, inline.end() - 1)
        except ValueError:  # for the compiler to complain about; but each counts the lines before it
            broken += 1
            if broken > _MAX_BROKEN:
                raise RequestError(
                    f"The grammar has over {_MAX_BROKEN} inline schemas that are no JSON: fix them."
                ) from None
            continue
        options = schema.pop("x-guidance", _JSON_OPTIONS)
        schema = without_idle_words(schema)
        require_enforced(schema)
        parts += [grammar[done : inline.end() - 1], json.dumps({**schema, "x-guidance": options})]
        done = end
    return "".join(parts) + grammar[done:]
