"""Frameworks over OpenAI's API against a live server: each does with its defaults what people use it for."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from live_server import NAME, Live, ask

pytestmark = pytest.mark.clients

KEY = "unused"


class Voyage(BaseModel):
    """Where to sail, and for how long."""

    to: Literal["Nantucket", "Bergen"]
    days: Literal[1, 2, 3]


def require(module: str) -> Any:
    return pytest.importorskip(module, reason=f"{module} is not installed (extra clients)")


def sail(to: str, days: int) -> str:
    """Sail somewhere.

    Args:
        to: the harbour.
        days: that it takes.
    """
    return f"{to} in {days}"


def answer(live: Live, prompt: str = "Where to?", max_tokens: int = 12) -> str:
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens, "temperature": 0}
    return ask(live, "/v1/chat/completions", body)[1]["choices"][0]["message"]["content"]


def environment(live: Live, home: Path) -> dict[str, str]:
    """For programs: no key, no network but the server."""
    return {
        **os.environ,
        "OPENAI_API_KEY": KEY,
        "OPENAI_BASE_URL": f"{live.url}/v1",
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "NO_COLOR": "1",
    }


def test_litellm(live: Live) -> None:
    litellm = require("litellm")
    asked: dict[str, Any] = {
        "model": f"openai/{NAME}", "api_base": f"{live.url}/v1", "api_key": KEY, "temperature": 0, "max_tokens": 12,
        "messages": [{"role": "user", "content": "Where to?"}],
    }  # fmt: skip
    assert litellm.completion(**asked).choices[0].message.content == answer(live)
    parts = litellm.completion(**asked, stream=True, drop_params=True, reasoning_effort="low")
    assert "".join(part.choices[0].delta.content or "" for part in parts) == answer(live)
    claude = {**asked, "model": f"anthropic/{NAME}", "api_base": live.url}
    assert litellm.completion(**claude).choices[0].message.content == answer(live)
    local = {**asked, "model": f"ollama_chat/{NAME}", "api_base": live.url}
    assert litellm.completion(**local).choices[0].message.content == answer(live)


def test_langchain_openai(with_tools: Live) -> None:
    langchain = require("langchain_openai")
    model = langchain.ChatOpenAI(
        model=NAME, base_url=f"{with_tools.url}/v1", api_key=KEY, temperature=0, max_tokens=12, max_retries=0
    )
    assert model.invoke("Where to?").content == answer(with_tools)
    assert "".join(part.content for part in model.stream("Where to?")) == answer(with_tools)
    more = langchain.ChatOpenAI(model=NAME, base_url=f"{with_tools.url}/v1", api_key=KEY, max_tokens=200, seed=1)
    call = more.bind_tools([Voyage], tool_choice="Voyage").invoke("Where to?").tool_calls[0]
    assert call["name"] == "Voyage" and set(call["args"]) == {"to", "days"}
    for method in ("json_schema", "function_calling"):
        assert isinstance(more.with_structured_output(Voyage, method=method).invoke("Where to?"), Voyage)
    by_responses = langchain.ChatOpenAI(
        model=NAME, base_url=f"{with_tools.url}/v1", api_key=KEY, use_responses_api=True, temperature=0, max_tokens=12
    )
    assert by_responses.invoke("Where to?").text == answer(with_tools)


def test_llama_index(with_tools: Live) -> None:
    like = require("llama_index.llms.openai_like")
    core = require("llama_index.core")
    options = {"model": NAME, "api_base": f"{with_tools.url}/v1", "api_key": KEY, "temperature": 0, "max_retries": 0}
    model = like.OpenAILike(**options, is_chat_model=True, max_tokens=12, is_function_calling_model=True)
    assert model.complete("Where to?").text == answer(with_tools)
    assert list(model.stream_complete("Where to?"))[-1].text == answer(with_tools)
    tool = core.tools.FunctionTool.from_defaults(sail)
    model.max_tokens = 200
    response = model.chat_with_tools([tool], user_msg="Where to?", tool_choice="sail", allow_parallel_tool_calls=False)
    (call,) = model.get_tool_calls_from_response(response)
    assert call.tool_name == "sail"
    plain = like.OpenAILike(**options, is_chat_model=False, max_tokens=12)
    assert plain.complete("It was a").text


def test_pydantic_ai(with_tools: Live) -> None:
    ai = require("pydantic_ai")
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{with_tools.url}/v1", api_key=KEY)
    settings = {"temperature": 0.0, "max_tokens": 12}
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        agent = ai.Agent(kind(NAME, provider=provider), model_settings=settings)
        result = agent.run_sync("Where to?")
        assert result.output == answer(with_tools)
        assert result.usage.output_tokens == 12

    async def streamed() -> str:
        async with agent.run_stream("Where to?") as run:
            return await run.get_output()

    assert asyncio.run(streamed()) == answer(with_tools)
    for output in (ai.NativeOutput(Voyage), ai.ToolOutput(Voyage)):
        held = ai.Agent(OpenAIChatModel(NAME, provider=provider), output_type=output, retries=0)
        more = {"max_tokens": 300, "seed": 1, "parallel_tool_calls": False}
        assert isinstance(held.run_sync("Where to?", model_settings=more).output, Voyage)


def test_instructor(with_tools: Live) -> None:
    instructor = require("instructor")
    import openai

    client = openai.OpenAI(base_url=f"{with_tools.url}/v1", api_key=KEY, max_retries=0)
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS_STRICT):
        voyage = instructor.from_openai(client, mode=mode).chat.completions.create(
            model=NAME, response_model=Voyage, max_retries=0, seed=1, max_tokens=300,
            messages=[{"role": "user", "content": "Where to?"}],
        )  # fmt: skip
        assert isinstance(voyage, Voyage)


def test_openai_agents(with_tools: Live) -> None:
    agents = require("agents")
    import openai

    client = openai.AsyncOpenAI(base_url=f"{with_tools.url}/v1", api_key=KEY, max_retries=0)
    agents.set_tracing_disabled(True)

    async def runs() -> None:
        for kind in (agents.OpenAIResponsesModel, agents.OpenAIChatCompletionsModel):
            agent = agents.Agent(
                name="captain",
                instructions="Be brief.",
                model=kind(model=NAME, openai_client=client),
                model_settings=agents.ModelSettings(max_tokens=300),
                tools=[agents.function_tool(sail)],
                output_type=Voyage,
            )
            assert isinstance((await agents.Runner.run(agent, "Where to?")).final_output, Voyage)

    asyncio.run(runs())


def test_the_llm_command(live: Live, tmp_path: Path) -> None:
    require("llm")
    folder = tmp_path / "llm"
    folder.mkdir()
    models = [{"model_id": "own", "model_name": NAME, "api_base": f"{live.url}/v1"}]
    (folder / "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML
    for stream in ([], ["--no-stream"]):
        done = subprocess.run(
            [sys.executable, "-m", "llm", "-m", "own", *stream, "-o", "temperature", "0", "-o", "max_tokens", "12",
             "Where to?"],
            env={**environment(live, tmp_path), "LLM_USER_PATH": str(folder)},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == answer(live).strip()


TASK = """\
task: harbours
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: OUTPUT
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
doc_to_choice: ["Bergen", "Nantucket"]
generation_kwargs: {until: ["."], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: METRIC}]
"""


@pytest.mark.parametrize(("output", "metric"), [("multiple_choice", "acc"), ("generate_until", "exact_match")])
def test_lm_eval(live: Live, tmp_path: Path, output: str, metric: str) -> None:
    require("lm_eval")
    docs = [{"q": f"Harbour {i}:", "a": "Bergen" if output == "generate_until" else 0} for i in range(4)]
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps(doc) for doc in docs))
    task = TASK.replace("FILE", str(tmp_path / "docs.jsonl")).replace("OUTPUT", output).replace("METRIC", metric)
    if output == "generate_until":
        task = task.replace('doc_to_choice: ["Bergen", "Nantucket"]\n', "")
    (tmp_path / "harbours.yaml").write_text(task)
    ids = "tokenizer_backend=None,tokenized_requests=False"
    tokenizer = f"tokenizer={live.llm.folder},tokenizer_backend=huggingface"
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--tasks", "harbours", "--include_path",
         str(tmp_path), "--model_args",
         f"model={NAME},base_url={live.url}/v1/completions,num_concurrent=2,{tokenizer if metric == 'acc' else ids}",
         "--output_path", str(tmp_path / "out")],
        env=environment(live, tmp_path), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(report.read_text())["results"]["harbours"]
    assert 0 <= results[f"{metric},none"] <= 1


def test_guidellm(live: Live, tmp_path: Path) -> None:
    require("guidellm")
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "guidellm", "run", "--backend", f"kind=openai_http,target={live.url}", "--profile",
         "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=4", "--data",
         "kind=synthetic_text,prompt_tokens=16,output_tokens=8", "--tokenizer",
         f"kind=hf_auto,model={live.llm.folder}", "--output", f"kind=json,path={report}", "--disable-console"],
        env=environment(live, tmp_path), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (4, 0)
