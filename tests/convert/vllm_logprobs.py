"""Run by an interpreter that has vLLM, as `vllm_logprobs.py FOLDER ASKED ANSWER`: what it predicts for given tokens.

ASKED is JSON: prompts (lists of token ids), top (how many of the likeliest tokens) and max_tokens. ANSWER becomes JSON:
for each prompt `prompt`, {token: logprob} of what may follow each of its tokens but the last, and `greedy`, of each
generated token its id and {token: logprob} of what might have been.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main() -> None:
    folder, asked, answer = sys.argv[1:]
    wanted = json.loads(Path(asked).read_text())
    llm = LLM(model=folder, skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_num_seqs=8)
    params = SamplingParams(
        temperature=0.0,
        max_tokens=wanted["max_tokens"],
        logprobs=wanted["top"],
        prompt_logprobs=wanted["top"],
        ignore_eos=True,
        detokenize=False,
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in wanted["prompts"]], params)
    found = [
        {
            "prompt": [_numbers(entry) for entry in output.prompt_logprobs[1:]],
            "greedy": [
                [token, _numbers(entry)]
                for token, entry in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
            ],
        }
        for output in outputs
    ]
    Path(answer).write_text(json.dumps(found))


def _numbers(entry) -> dict[int, float]:
    return {token: value.logprob for token, value in entry.items()}


if __name__ == "__main__":
    main()
