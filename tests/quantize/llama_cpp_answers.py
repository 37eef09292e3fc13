"""What llama.cpp makes of a GGUF file: run in an interpreter that has xllamacpp, with a file of questions.

The questions are {"model": path, "texts": [...], "prompts": [token ids, ...]}; the answers, printed as the last line,
are {"tokens": of each text, "next": [[token id, log-probability], ...] of each prompt, likeliest first}.
"""

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """What a server on this model says."""
    params = xllamacpp.CommonParams()
    params.model.path = asked["model"]
    params.n_ctx, params.n_parallel, params.warmup = 1024, 1, False
    params.cpuparams.n_threads = 2
    server = xllamacpp.Server(params)
    tokens = [_tokens(server, text) for text in asked["texts"]]
    following: list[list[list[Any]]] = []
    for prompt in asked["prompts"]:
        options = {"n_predict": 1, "temperature": 0.0, "n_probs": 3, "cache_prompt": True}
        said = _json(server.handle_completions({"prompt": prompt} | options))
        # Of the end of a text, and of a byte that is no whole character, it says nothing.
        logprobs = said["choices"][0]["logprobs"] or {"content": [{"top_logprobs": []}]}
        following.append([[entry["id"], entry["logprob"]] for entry in logprobs["content"][0]["top_logprobs"]])
    return {"tokens": tokens, "next": following}


def _tokens(server: xllamacpp.Server, text: str) -> list[int]:
    content = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", content)
    with urllib.request.urlopen(request, timeout=60) as said:
        return json.load(said)["tokens"]


def _json(value: Any) -> Any:
    return value if isinstance(value, dict) else json.loads(value)


if __name__ == "__main__":
    print("\n" + json.dumps(answer(json.loads(Path(sys.argv[1]).read_text()))), flush=True)
