"""What a grammar must force where a request says that a tool has to be called, in llguidance's Lark syntax."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from latentkv.errors import RequestError
from latentkv.text.tools.formats import (
    CallFormat,
    JsonArguments,
    JsonCall,
    OutputFormat,
    ReasoningTags,
    TaggedArguments,
)
from latentkv.text.tools.specs import Tool, ToolChoice
from latentkv.text.tools.values import allowed_types, is_text

# As `tojson` writes it, or without the spaces: never the unbounded whitespace that JSON allows and models get lost in.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_ANY_TEXT = "/(?s:.*)/"
_GAP = r"/\n{0,2}/"
_SPACE = r"/[ \n]{0,4}/"


def call_grammar(
    format: OutputFormat,
    tools: Sequence[Tool],
    choice: ToolChoice,
    *,
    special: Mapping[str, int] | None = None,
    reasoning_open: bool = False,
    parallel: bool = True,
) -> str | None:
    """Writes the grammar of an output that calls a tool, in the words of the model's family.

    The arguments follow the tool's JSON schema, keys in the schema's order. Reasoning may come first where the model
    reasons. A named tool is called once; any of the tools once or, where the family can, several times.

    Args:
        format: how the model writes calls.
        tools: those of the request.
        choice: whether a call is required, and of which tool.
        special: markers of the format that are one token each and special to the engine that enforces the grammar:
            it matches them by id and never as text. The others are matched as text.
        reasoning_open: whether the output begins inside of reasoning.
        parallel: whether several calls may be made.

    Returns:
        A Lark grammar, or None where nothing is forced ("none" and "auto").

    Raises:
        RequestError: a call is required of a model that is not known to write any.
    """
    if choice.mode != "required":
        return None
    if format.calls is None:
        raise RequestError('This model has no known tool call format: use tool_choice "auto" or "none".')
    chosen = [tool for tool in tools if choice.name in (None, tool.name)]
    writer = _CallRules(format.calls, special or {})
    once = choice.name is not None or not parallel or format.calls.between is None
    start = "calls"
    if format.reasoning:
        start = writer.reasoning(format.reasoning, reasoning_open) + " calls"
    writer.rule("start", start)
    writer.calls(chosen, once=once)
    return writer.text()


def json_after_reasoning(tags: ReasoningTags, schema: str, *, special: Mapping[str, int]) -> str:
    """Writes the grammar of an output that ends its reasoning, which the prompt has opened, and then is JSON.

    Args:
        tags: around the reasoning.
        schema: text of the JSON schema.
        special: as in `call_grammar`.
    """
    rules = _Rules(special)
    rules.rule("start", f"{rules.reasoning(tags, is_open=True)} form")
    rules.rule("form", f"%json {schema}")
    return rules.text()


class _Rules:
    """Collects the rules of one grammar."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        self._split = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True)))) if special else None
        self._rules: list[str] = []

    def text(self) -> str:
        return "\n".join(self._rules) + "\n"

    def rule(self, name: str, body: str) -> None:
        self._rules.append(f"{name}: {body}")

    def reasoning(self, tags: ReasoningTags, is_open: bool) -> str:
        self._text_before("thought", tags.close)
        if is_open:
            return f"thought {_SPACE}"
        return f"({_SPACE} {self._literal(tags.open)} thought {_SPACE})?"

    def _text_before(self, rule: str, end: str) -> None:
        """A rule for any text up to the first `end`, and `end` itself."""
        if end in self._special:
            self.rule(rule, f"{_ANY_TEXT} {self._literal(end)}")
        else:
            self.rule(f"{rule}[suffix={_quoted(end)}]", _ANY_TEXT)

    def _literal(self, text: str) -> str:
        """A text as tokens by id where they are special, and as strings between them."""
        parts: list[str] = []
        at = 0
        for match in self._split.finditer(text) if self._split else ():
            parts += [_quoted(text[at : match.start()])] if match.start() > at else []
            parts.append(f"<[{self._special[match.group()]}]>")
            at = match.end()
        parts += [_quoted(text[at:])] if at < len(text) else []
        return " ".join(parts)


class _CallRules(_Rules):
    """Those of calls."""

    def __init__(self, format: CallFormat, special: Mapping[str, int]) -> None:
        super().__init__(special)
        self._format = format

    def calls(self, tools: Sequence[Tool], *, once: bool) -> None:
        format = self._format
        between = self._space(format.between)
        calls = "call" if once else f"call ({between} call)*"
        if format.section:
            open, close = map(self._literal, format.section)
            calls = f"{open} {between} {calls} {between} {close}"
        self.rule("calls", f"{self._space(format.lead)} {calls}")
        self.rule("call", " | ".join(f"call_{number}" for number in range(len(tools))))
        for number, tool in enumerate(tools):
            self.rule(f"call_{number}", self._call(tool, number))

    def _call(self, tool: Tool, number: int) -> str:
        open, close = self._format.open, self._format.close
        arguments = f"arguments_{number}"
        match self._format.body:
            case JsonArguments() as body:
                self._json(arguments, tool.parameters)
                before = self._literal(f"{open}{body.before_name}{tool.name}")
                numbered = ' ":" /[0-9]{1,4}/' if body.numbered else ""
                return (
                    f"{before}{numbered} {self._literal(body.after_name)} {arguments} "
                    f"{self._literal(body.after + close)}"
                )
            case JsonCall() as body:
                self._json(arguments, tool.parameters)
                before = f"{{{json.dumps('name')}: {_quoted(tool.name)}, {_quoted(body.arguments)}: "
                if body.bare:
                    return f"{self._literal(before)} {arguments} {self._literal('}')}"
                return (
                    f"{self._literal(open)} {_GAP} {self._literal(before)} {arguments} {self._literal('}')} {_GAP} "
                    f"{self._literal(close)}"
                )
            case TaggedArguments() as body:
                parts = [self._literal(f"{open}{tool.name}{body.name_end}"), _GAP]
                required = cast(list[Any], tool.parameters.get("required") or [])
                properties = cast(dict[str, Any], tool.parameters.get("properties") or {})
                for index, key in enumerate(dict.fromkeys([*properties, *required])):
                    argument = self._argument(body, tool, str(key), f"value_{number}_{index}")
                    parts.append(argument if key in required else f"({argument})?")
                return " ".join([*parts, self._literal(close)])

    def _argument(self, body: TaggedArguments, tool: Tool, key: str, rule: str) -> str:
        schema = tool.schema_of(key)
        types = allowed_types(schema)
        as_text = not types or "string" in types
        as_json = not is_text(schema) and bool(types - {"string"} or not types)
        before = self._literal(body.key_open + key + body.key_close)
        choices: list[str] = []
        for opening, kind in body.value_opens.items():
            if as_text and kind != "json":
                choices.append(f"{self._literal(opening)} {self._text_value(schema, f'{rule}_text', body.value_close)}")
            if as_json and (kind == "json" or (kind == "schema" and not as_text)):
                self._json(f"{rule}_json", self._with_definitions(schema, tool))
                choices.append(f"{self._literal(opening)} {rule}_json {self._literal(body.value_close)}")
        self.rule(rule, " | ".join(choices))
        return f"{before} {_GAP} {rule} {_GAP}"

    def _text_value(self, schema: Mapping[str, Any], rule: str, close: str) -> str:
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(values, list):
            texts = [text for text in cast(list[Any], values) if isinstance(text, str)]
            self.rule(rule, " | ".join(self._literal(text + close) for text in texts))
        else:
            self._text_before(rule, close)
        return rule

    @staticmethod
    def _with_definitions(schema: Mapping[str, Any], tool: Tool) -> Mapping[str, Any]:
        """What a part of a schema refers to stands in the whole."""
        return {**{key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}, **schema}

    def _json(self, rule: str, schema: Mapping[str, Any]) -> None:
        try:
            text = json.dumps({**schema, "x-guidance": _JSON_STYLE})
        except (RecursionError, TypeError, ValueError) as error:
            raise RequestError("The parameters of a tool are nested too deeply or are not JSON.") from error
        self.rule(rule, f"%json {text}")

    @staticmethod
    def _space(written: str | None) -> str:
        return _GAP if written else ""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
