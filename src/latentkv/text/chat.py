"""Chat templates: a checkpoint's jinja2 source, run with limits and with the conventions of `transformers`."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, cast

from latentkv.errors import RequestError, TokenizerError
from latentkv.text.template_process import template_processes
from latentkv.text.tools.history import CallStyle, find_style, has_calls, with_style
from latentkv.text.tools.specs import read_tools

MAX_DEPTH = 100  # of lists and dicts within each other in what is given to a template

# For models that were given no template: names and paragraphs, the way a script is printed.
PLAIN_TEMPLATE = """\
{{ plain_bos }}
{%- for message in messages -%}
{{ message.role | capitalize }}: {{ message.content or '' }}

{% endfor -%}
{% if add_generation_prompt %}Assistant:{% endif %}"""


class ChatTemplate:
    """The templates of one checkpoint, or the plain one.

    Args:
        sources: jinja sources by name: "default", and "tool_use" if there is another one for tools; may be empty.
        named_tokens: `bos_token`, `eos_token`, ... as the template may write them.
        plain_bos: whether the plain template begins with `bos_token`.
    """

    def __init__(self, sources: Mapping[str, str], named_tokens: Mapping[str, str], *, plain_bos: bool = False) -> None:
        self.source: Literal["checkpoint", "plain"] = "checkpoint" if sources else "plain"
        self._sources = dict(sources) or {"default": PLAIN_TEMPLATE}
        self._variables = {**named_tokens, "plain_bos": named_tokens.get("bos_token", "") if plain_bos else ""}
        self._styles: dict[str, CallStyle] = {}

    @property
    def tools_source(self) -> str:
        """The jinja source that conversations with tools are written with; "" for the plain template."""
        return "" if self.source == "plain" else self._sources.get(self._name(with_tools=True), "")

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the template does anything with tools."""
        return "tool_use" in self._sources or template_processes().reads_tools(self.tools_source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **json_kwargs: Any,
    ) -> str:
        """Writes a conversation as text.

        Args:
            messages: dicts with `role` and `content`. Content is text or a list of `{"type": "text", "text": ...}`
                parts, which are joined; it may be None or absent beside `tool_calls`, whose arguments are JSON text or
                an object, whichever the template wants. Other keys reach the template.
            add_generation_prompt: end with the opening of the assistant's turn.
            continue_final_message: end with the text of the last message, which is to be gone on with, and open no
                turn.
            tools: functions as OpenAI's API writes them; an empty list is none.
            documents: documents, if the template knows them.
            json_kwargs: further variables for the template (`enable_thinking=False`), JSON values only.

        Raises:
            TokenizerError: messages are malformed, an argument is not JSON, or the template fails or refuses, or does
                not write the last message as it is.
            RequestError: tools are malformed, or the template takes none.
        """
        if tools is not None and read_tools(tools) and not self.takes_tools:
            raise RequestError(
                "The model's chat template takes no tools: ask without, or give the model's folder a "
                "chat_template.jinja that takes them."
            )
        checked = _checked_messages(messages)
        variables = {
            **self._variables,
            **{name: _plain_json(value, name) for name, value in json_kwargs.items()},
            "tools": _plain_json(tools, "tools") or None,
            "documents": _plain_json(documents, "documents"),
            "add_generation_prompt": bool(add_generation_prompt) and not continue_final_message,
        }
        name = self._name(with_tools=bool(tools))
        if has_calls(checked):
            checked = with_style(checked, self._style(name))
        text = self._write(name, {**variables, "messages": checked})
        return _up_to(text, checked[-1].get("content")) if continue_final_message else text

    def _style(self, name: str) -> CallStyle:
        """Found with no variable of a request, because it holds for all of them."""
        if name not in self._styles:
            variables = {**self._variables, "tools": None, "documents": None, "add_generation_prompt": False}
            self._styles[name] = find_style(lambda messages: self._write(name, {**variables, "messages": messages}))
        return self._styles[name]

    def _write(self, name: str, variables: Mapping[str, Any]) -> str:
        if name not in self._sources:
            known = ", ".join(sorted(self._sources))
            raise TokenizerError(f"The checkpoint has no default chat template, only: {known}.")
        return template_processes().render(self._sources[name], variables)

    def _name(self, *, with_tools: bool) -> str:
        return "tool_use" if with_tools and "tool_use" in self._sources else "default"


def _up_to(text: str, last: object) -> str:
    """A conversation up to the end of its last message, whose blanks a template may cut off."""
    if not isinstance(last, str) or not last.strip():
        raise TokenizerError("The last message has no text to go on with: give it some, or ask for a new message.")
    for content in (last, last.rstrip(), last.strip()):
        if (start := text.rfind(content)) >= 0:
            return text[: start + len(content)]
    raise TokenizerError("The chat template changes the last message, so it cannot be gone on with.")


def text_length(messages: Sequence[Mapping[str, Any]]) -> int:
    """Characters of the text in a conversation, whether or not it is well formed."""
    length = 0
    for message in messages if isinstance(cast(object, messages), Sequence) else ():
        content = message.get("content") if isinstance(cast(object, message), Mapping) else None
        for part in cast(list[Any], content) if isinstance(content, list) else [{"text": content}]:
            text = cast(Mapping[str, Any], part).get("text") if isinstance(part, Mapping) else None
            length += len(text) if isinstance(text, str) else 0
    return length


def _checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(cast(object, messages), Sequence):
        raise TokenizerError('Messages must be a list of {"role": ..., "content": ...}.')
    if not messages:
        raise TokenizerError("A conversation needs at least one message.")
    return [_checked_message(message, index) for index, message in enumerate(messages)]


def _checked_message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    where = f"Message {index + 1}"
    if not isinstance(cast(object, message), Mapping):
        raise TokenizerError(f'{where} must be a dict with "role" and "content", not {type(message).__name__}.')
    plain = cast(dict[str, Any], _plain_json(message, where))
    if not isinstance(plain.get("role"), str) or not plain["role"]:
        raise TokenizerError(f'{where} has no "role".')
    if not plain.get("tool_calls"):
        plain.pop("tool_calls", None)  # templates ask whether there is such a key
    elif not isinstance(plain["tool_calls"], list):
        raise TokenizerError(f'{where}: "tool_calls" must be a list.')
    content = plain.get("content")
    if content is None and "tool_calls" not in plain:
        raise TokenizerError(f'{where} has no "content".')
    if isinstance(content, list):
        plain["content"] = "".join(_text_part(part, where) for part in cast(list[Any], content))
    elif content is not None and not isinstance(content, str):
        raise TokenizerError(f"{where}: content must be text or a list of text parts, not {type(content).__name__}.")
    return plain


def _text_part(part: Any, where: str) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case _:
            raise TokenizerError(f'{where}: only parts {{"type": "text", "text": ...}} are supported.')


def _plain_json(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made of plain JSON types, so that a template never holds an object with methods of its own."""
    if depth > MAX_DEPTH:
        raise TokenizerError(f"{where} is nested more than {MAX_DEPTH} deep.")
    if value is None or isinstance(value, bool):
        return value
    for scalar in (str, int, float):
        if isinstance(value, scalar):
            return scalar(value)
    if isinstance(value, Mapping):
        return {str(key): _plain_json(item, where, depth + 1) for key, item in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain_json(item, where, depth + 1) for item in cast(Sequence[Any], value)]
    raise TokenizerError(f"{where} must be JSON (text, numbers, lists, dicts), but holds a {type(value).__name__}.")
