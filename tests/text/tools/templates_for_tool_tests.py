"""Small chat templates that write tool calls as each family documents it, and tools and calls to write with them."""

import json
from typing import Any

from latentkv.text.tools import AssistantMessage

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "units": {"type": "string", "enum": ["metric", "imperial"]},
                "spots": {"type": "array", "items": {"type": "object"}},
                "exact": {"type": "boolean"},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
TOOLS = [WEATHER, TIME]

_TURNS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<USER>' + m.content }}"
    "{% elif m.role == 'tool' %}{{ '<RESULT>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<BOT>' }}ASSISTANT<END>{% endif %}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}{{ '<BOT>' }}{% endif %}"
)


def _template(assistant: str) -> str:
    return _TURNS.replace("ASSISTANT", assistant)


_DEEPSEEK = (
    "{{ m.content or '' }}{% if m.tool_calls %}{{ '<｜tool▁calls▁begin｜>' }}"
    "{% for c in m.tool_calls %}CALL{% endfor %}{{ '<｜tool▁calls▁end｜>' }}{% endif %}"
)
_V3_CALL = (
    "{{ ('' if loop.first else '\\n') + '<｜tool▁call▁begin｜>' + c['type'] + '<｜tool▁sep｜>' + c.function.name "
    "+ '\\n```json\\n' + ARGUMENTS + '\\n```' + '<｜tool▁call▁end｜>' }}"
)
_GLM = (
    "{{ '<think>' + (m.reasoning_content or '') + '</think>' }}{{ 'NL' + m.content if m.content else '' }}"
    "{% for c in m.tool_calls or [] %}{{ 'NL<tool_call>' + c.function.name }}"
    "{% for k, v in c.function.arguments.items() %}{{ 'NL<arg_key>' + k + '</arg_key>NL<arg_value>' "
    "+ (v if v is string else v | tojson) + '</arg_value>' }}{% endfor %}{{ 'NL</tool_call>' }}{% endfor %}"
)

TEMPLATES = {
    "deepseek_v3": _template(_DEEPSEEK.replace("CALL", _V3_CALL.replace("ARGUMENTS", "c.function.arguments | tojson"))),
    # The first published one: arguments are joined as text, and calls written only where the content is none.
    "deepseek_v3 text": _template(
        "{% if m.content is none %}"
        + _DEEPSEEK.replace("CALL", _V3_CALL.replace("ARGUMENTS", "c.function.arguments"))
        + "{% else %}{{ m.content }}{% endif %}"
    ),
    "deepseek_v31": _template(
        _DEEPSEEK.replace(
            "CALL",
            "{{ '<｜tool▁call▁begin｜>' + c.function.name + '<｜tool▁sep｜>' + c.function.arguments "
            "+ '<｜tool▁call▁end｜>' }}",
        )
    ),
    "deepseek_v32": _template(
        "{{ (m.reasoning_content or '') + '</think>' + m.content }}"
        "{% if m.tool_calls %}{{ '\\n\\n<｜DSML｜function_calls>' }}{% for c in m.tool_calls %}"
        "{{ '\\n<｜DSML｜invoke name=\"' + c.function.name + '\">\\n' }}"
        "{% for k, v in c.function.arguments.items() %}{{ '' if loop.first else '\\n' }}"
        "{{ '<｜DSML｜parameter name=\"' + k + '\" string=\"' + ('true' if v is string else 'false') + '\">' "
        "+ (v if v is string else v | tojson) + '</｜DSML｜parameter>' }}{% endfor %}"
        "{{ '\\n</｜DSML｜invoke>' }}{% endfor %}{{ '\\n</｜DSML｜function_calls>' }}{% endif %}"
    ),
    "kimi_k2": _template(
        "{{ m.content or '' }}{% if m.tool_calls %}{{ '<|tool_calls_section_begin|>' }}{% for c in m.tool_calls %}"
        "{{ '<|tool_call_begin|>' + c.id + '<|tool_call_argument_begin|>' }}"
        "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}"
        "{{ '<|tool_call_end|>' }}{% endfor %}{{ '<|tool_calls_section_end|>' }}{% endif %}"
    ),
    "glm": _template(_GLM.replace("NL", "\\n")),
    "glm 4.7": _template(_GLM.replace("NL", "")),
    "hermes": _template(
        "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' if m.reasoning_content else '' }}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ '' if loop.first and not m.content else '\\n' }}"
        '{{ \'<tool_call>\\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
        "{{ c.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}"
    ),
    "llama3": _template(
        '{% if m.tool_calls %}{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
        "{{ m.tool_calls[0].function.arguments | tojson }}{{ '}' }}{% else %}{{ m.content }}{% endif %}"
        "{{ '' if true else '<|start_header_id|>' }}"
    ),
}
FAMILIES = {name: name.split()[0] for name in TEMPLATES}
ONE_CALL = ("llama3",)

CALLS = [
    ("get_weather", {"city": 'Köln "<b>"\n\\ 5', "days": 2, "spots": [{"x": [1.5, None]}], "exact": True}),
    ("get_time", {}),
    ("get_weather", {"city": "12", "units": "metric"}),
]


def assistant(
    calls: list[tuple[str, dict[str, Any]]] = CALLS, *, content: str | None = None, reasoning: str | None = None
) -> dict[str, Any]:
    """An assistant's message as OpenAI's API writes it."""
    tool_calls = [
        {
            "id": f"functions.{name}:{number}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
        }
        for number, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": tool_calls}


def calls_of(message: AssistantMessage) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of the calls in a parsed output."""
    return [(call.name, json.loads(call.arguments)) for call in message.tool_calls]
