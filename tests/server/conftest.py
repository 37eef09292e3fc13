from __future__ import annotations

import shutil
from collections.abc import Iterator

import openai
import pytest

from latentkv import LLM
from latentkv.llm_options import EMBEDDED_MODEL
from live_server import Live, serving

# In the manner of Hermes and Qwen: tools in the system turn, calls between tags.
TEMPLATE = """\
{%- if tools %}Tools: {{ tools | tojson }} Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call>

{% endif %}
{%- for message in messages -%}
{{ message.role | capitalize }}: {{ message.content or '' }}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}

{% endfor -%}
{% if add_generation_prompt %}Assistant:{% endif %}"""
THINKING = TEMPLATE.replace("Assistant:{% endif %}", "Assistant:{% if enable_thinking %}<think>{% endif %}{% endif %}")
"""And opens reasoning where it is asked to."""


@pytest.fixture(scope="session")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server whose template takes tools."""
    with serving(_with_template(TEMPLATE, tmp_path_factory)) as server:
        yield server


@pytest.fixture(scope="session")
def with_thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server whose template takes tools, and can turn reasoning on."""
    with serving(_with_template(THINKING, tmp_path_factory)) as server:
        yield server


def _with_template(template: str, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(EMBEDDED_MODEL, folder)
    (folder / "chat_template.jinja").write_text(template)
    return LLM(folder, dtype="fp32", kv_cache_bytes=16 << 20)


@pytest.fixture(scope="session")
def openai_client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture
def client(openai_client: openai.OpenAI, live: Live) -> Iterator[openai.OpenAI]:
    yield openai_client
    live.wait_until_free()
