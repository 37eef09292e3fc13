"""How each family of models writes reasoning and tool calls, as data, and which of them a checkpoint uses."""

import re
from dataclasses import dataclass
from typing import Literal

from latentkv.errors import RequestError


@dataclass(frozen=True)
class ReasoningTags:
    """What stands around the model's reasoning."""

    open: str
    close: str


@dataclass(frozen=True)
class JsonArguments:
    """A header with the function's name, then the arguments as one JSON object.

    Attributes:
        before_name: written before the name.
        after_name: written between the name and the arguments.
        after: written after the arguments.
        numbered: whether the name is followed by ":" and the number of the call, and is with it the call's id.
    """

    before_name: str
    after_name: str
    after: str = ""
    numbered: bool = False


@dataclass(frozen=True)
class JsonCall:
    """One JSON object that holds the name and the arguments.

    Attributes:
        arguments: the key that the family writes; both that and the others' are read.
        bare: whether the object may stand without a marker, as the whole answer. Then it is a call only if it names
            one of the given tools, because an answer may be such an object as well.
    """

    arguments: Literal["arguments", "parameters"]
    bare: bool = False


@dataclass(frozen=True)
class TaggedArguments:
    """The name, then every argument as a key and a value between tags; the value's type is not, or hardly, written.

    Attributes:
        name_end: written after the name; "" where only the next tag ends it.
        key_open, key_close: around a key.
        value_opens: what may stand before a value, and what it says of it: "text", "json", or "schema" (the tool's
            schema tells).
        value_close: written after a value.
    """

    name_end: str
    key_open: str
    key_close: str
    value_opens: dict[str, Literal["text", "json", "schema"]]
    value_close: str


@dataclass(frozen=True)
class CallFormat:
    """How a family writes tool calls. Whitespace at the edges of a text is what templates write; none is required.

    Attributes:
        name: by which a user may choose it.
        open, close: around one call.
        body: what stands between them.
        section: what stands around all calls, where anything does.
        lead: whitespace before the first call.
        between: whitespace between two calls; None where the family makes one call at a time.
        ends_reasoning: whether a call's marker ends reasoning that was not closed.
    """

    name: str
    open: str
    close: str
    body: JsonArguments | JsonCall | TaggedArguments
    section: tuple[str, str] | None = None
    lead: str = ""
    between: str | None = ""
    ends_reasoning: bool = False

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text that the format writes."""
        texts = [*(self.section or ()), self.open, self.close]
        match self.body:
            case JsonArguments(before_name, after_name, after):
                texts += [before_name, after_name, after]
            case TaggedArguments():
                body = self.body
                texts += [body.name_end, body.key_open, body.key_close, *body.value_opens, body.value_close]
            case JsonCall():
                pass
        return tuple(text for text in texts if text)


@dataclass(frozen=True)
class OutputFormat:
    """What to look for in a model's output.

    Attributes:
        calls: how tool calls are written, None where the model is not known to write any.
        reasoning: what stands around reasoning, None where the model does not reason.
    """

    calls: CallFormat | None = None
    reasoning: ReasoningTags | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        """What a tokenizer may have as one token, special ones among them; they must reach the parser as text."""
        texts = [*(self.calls.texts if self.calls else ())]
        texts += [self.reasoning.open, self.reasoning.close] if self.reasoning else []
        found = (match.group() for text in texts for token in _TOKENS for match in token.finditer(text))
        return tuple(dict.fromkeys(found))


# What tokens in the texts below look like.
_TOKENS = (re.compile(r'<[^<>\s"]+>'), re.compile(r"｜DSML｜"), re.compile(r"◁[^▷]+▷"))
_DEEPSEEK_SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")

CALL_FORMATS = {
    calls.name: calls
    for calls in (
        CallFormat(
            name="deepseek_v3",
            open="<｜tool▁call▁begin｜>",
            close="<｜tool▁call▁end｜>",
            body=JsonArguments("function<｜tool▁sep｜>", "\n```json\n", "\n```"),
            section=_DEEPSEEK_SECTION,
            between="\n",
        ),
        CallFormat(
            name="deepseek_v31",
            open="<｜tool▁call▁begin｜>",
            close="<｜tool▁call▁end｜>",
            body=JsonArguments("", "<｜tool▁sep｜>"),
            section=_DEEPSEEK_SECTION,
        ),
        CallFormat(
            name="deepseek_v32",
            open='<｜DSML｜invoke name="',
            close="</｜DSML｜invoke>",
            body=TaggedArguments(
                name_end='">',
                key_open='<｜DSML｜parameter name="',
                key_close='" string="',
                value_opens={'true">': "text", 'false">': "json"},
                value_close="</｜DSML｜parameter>",
            ),
            section=("<｜DSML｜function_calls>", "</｜DSML｜function_calls>"),
            lead="\n\n",
            between="\n",
        ),
        CallFormat(
            name="kimi_k2",
            open="<|tool_call_begin|>",
            close="<|tool_call_end|>",
            body=JsonArguments("functions.", "<|tool_call_argument_begin|>", numbered=True),
            section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
            ends_reasoning=True,
        ),
        CallFormat(
            name="glm",
            open="<tool_call>",
            close="</tool_call>",
            body=TaggedArguments(
                name_end="",
                key_open="<arg_key>",
                key_close="</arg_key>",
                value_opens={"<arg_value>": "schema"},
                value_close="</arg_value>",
            ),
            lead="\n",
            between="\n",
        ),
        CallFormat(
            name="hermes",
            open="<tool_call>",
            close="</tool_call>",
            body=JsonCall("arguments"),
            lead="\n",
            between="\n",
        ),
        CallFormat(
            name="llama3",
            open="<|python_tag|>",
            close="",
            body=JsonCall("parameters", bare=True),
            between=None,
        ),
    )
}

# Texts that a chat template must all hold for the format; the first line that fits is taken. Qwen3-Coder's calls, which
# are XML within Hermes's tags, are not known here.
_TEMPLATE_MARKERS: tuple[tuple[tuple[str, ...], str | None], ...] = (
    (("｜DSML｜",), "deepseek_v32"),
    (("<｜tool▁calls▁begin｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁calls▁begin｜>",), "deepseek_v31"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    (("<tool_call>", "<arg_key>"), "glm"),
    (("<tool_call>", "<function="), None),
    (("<tool_call>",), "hermes"),
    (("<|start_header_id|>", '"parameters"'), "llama3"),
)
# Where the template says nothing, as that of DeepSeek-V3.2, which is no jinja. The model type deepseek_v3 is not here:
# DeepSeek-V3, R1, V3.1 and others share it and write calls differently.
_MODEL_TYPES = {"deepseek_v32": "deepseek_v32", "kimi_k2": "kimi_k2", "glm4_moe": "glm", "glm4_moe_lite": "glm"}
_THINK = ReasoningTags("<think>", "</think>")
_REASONING_TAGS = (_THINK, ReasoningTags("◁think▷", "◁/think▷"))
_REASONING_MODEL_TYPES = {"deepseek_v32": _THINK, "glm4_moe": _THINK, "glm4_moe_lite": _THINK}


def choose_format(template: str, model_type: str, name: str | None = None) -> OutputFormat:
    """Which format a checkpoint writes, as far as its chat template and its model type tell.

    Args:
        template: the source of the chat template, "" where there is none.
        model_type: of its config.json.
        name: a name of `CALL_FORMATS`, or "none", to choose the format of calls instead of finding it.

    Raises:
        RequestError: there is no format of this name.
    """
    if name is None:
        found = (format for texts, format in _TEMPLATE_MARKERS if all(text in template for text in texts))
        name = next(found, _MODEL_TYPES.get(model_type)) or "none"
    if name != "none" and name not in CALL_FORMATS:
        raise RequestError(f"There is no tool call format {name!r}: choose from {', '.join(CALL_FORMATS)} and none.")
    reasoning = next((tags for tags in _REASONING_TAGS if tags.open in template or tags.close in template), None)
    if not template:
        reasoning = _REASONING_MODEL_TYPES.get(model_type)
    return OutputFormat(CALL_FORMATS.get(name), reasoning)


def reasoning_is_open(prompt: str, format: OutputFormat) -> bool:
    """Whether a prompt ends in the tag that opens reasoning, so that the output begins inside of it."""
    return format.reasoning is not None and prompt.rstrip().endswith(format.reasoning.open)
