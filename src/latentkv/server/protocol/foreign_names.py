"""The tables of `foreign`, by kind of request: OpenAI's newer words, those of vLLM, SGLang, llama.cpp and Ollama."""

from __future__ import annotations

from typing import Any, cast

from latentkv.server.protocol.foreign import Means, Only, Rule, Tag, Turned

NUMBER = (int, float)
AS_MANY_AS_FIT = -1

_LEAVE_OR_FALSE = "leave it out or send false"
_ONE_FILTER = "this sampler has none; use temperature, top_k, top_p and min_p"

TAGS: dict[str, Rule] = {
    "service_tier": Tag(),
    "prompt_cache_key": Tag(),
    "prompt_cache_retention": Tag(),
    "safety_identifier": Tag(),
    "request_id": Tag(),
    "rid": Tag(),
}
"""Of every kind of request."""


def _effort_of(value: Any) -> str | None:
    """`reasoning_effort` of the many ways to say whether, and how much, a model reasons."""
    match value:
        case bool():
            return "medium" if value else "none"
        case str():
            return value
        case dict():
            asked = cast("dict[str, Any]", {name: each for name, each in value.items() if each is not None})
        case _:
            raise ValueError("give reasoning_effort")
    if asked.get("exclude") is False:
        asked.pop("exclude")
    match asked:
        case {} if not asked:
            return None
        case {"effort": str(effort), **rest} if not rest or rest == {"enabled": effort != "none"}:
            return effort
        case {"enabled": bool(enabled), **rest} if not rest:
            return _effort_of(enabled)
        case {"type": "enabled" | "disabled" | "adaptive" as kind, **rest} if not rest:
            return _effort_of(kind != "disabled")
        case _:
            raise ValueError("reasoning has no budget and is not hidden here; give reasoning_effort")


def _structured(name: str) -> Means:
    return Means("structured_outputs", lambda value: {name: value})


def _as_max_tokens(value: Any) -> Any:
    if value == 0:
        raise ValueError("it asks for no token; -1 asks for as many as fit")
    return value


def _num_predict(value: Any) -> Any:
    return None if value in (AS_MANY_AS_FIT, -2) else _as_max_tokens(value)


GENERATION: dict[str, Rule] = {
    **TAGS,
    "metadata": Tag((dict,)),
    "store": Only((False,), "nothing is stored; leave it out or send false"),
    "prediction": Tag((dict,)),  # only makes the same answer come sooner, elsewhere
    # What sampling there is elsewhere, switched off. What would tune what is off says nothing.
    "typical_p": Only((1,), _ONE_FILTER),
    "tfs_z": Only((1,), _ONE_FILTER),
    "top_a": Only((0,), _ONE_FILTER),
    "mirostat": Only((0,), _ONE_FILTER),
    "mirostat_tau": Tag(NUMBER),
    "mirostat_eta": Tag(NUMBER),
    "dynatemp_range": Only((0,), _ONE_FILTER),
    "dynatemp_exponent": Tag(NUMBER),
    "xtc_probability": Only((0,), _ONE_FILTER),
    "xtc_threshold": Tag(NUMBER),
    "dry_multiplier": Only((0,), "use repetition_penalty"),
    "dry_base": Tag(NUMBER),
    "dry_allowed_length": Tag((int,)),
    "dry_penalty_last_n": Tag((int,)),
    "repeat_last_n": Only((-1,), "repetition_penalty looks at all of prompt and text; send -1"),
    "min_keep": Only((0, 1)),
    "samplers": Only((), "the order of the filters is fixed; leave it out"),
    "length_penalty": Only((1,), "there is no beam search"),
    "early_stopping": Only((False,), "there is no beam search; leave it out or send false"),
    "use_beam_search": Only((False,), "there is no beam search; use best_of of /v1/completions, or send false"),
    "allowed_token_ids": Only(([],), "say what may be written by structured_outputs"),
    "logits_processors": Only(([],), "no code of a request runs; leave it out"),
    "priority": Only((0,), "all requests are equal; leave it out or send 0"),
    "truncate_prompt_tokens": Only((), "a prompt is never cut; send a shorter one"),
    # How the answer is written.
    "skip_special_tokens": Only((True,), "special tokens are no text; leave it out or send true"),
    "spaces_between_special_tokens": Tag((bool,)),
    "include_stop_str_in_output": Only((False,), f"the text ends before it; {_LEAVE_OR_FALSE}"),
    "no_stop_trim": Only((False,), f"the text ends before a stop string; {_LEAVE_OR_FALSE}"),
    "detokenize": Only((True,), "leave it out or send true"),
    "return_token_ids": Only((False,), f"ask for logprobs to see tokens; {_LEAVE_OR_FALSE}"),
    "return_tokens_as_token_ids": Only((False,), _LEAVE_OR_FALSE),
    "timings_per_token": Only((False,), f"/metrics has timings; {_LEAVE_OR_FALSE}"),
    "return_progress": Only((False,), _LEAVE_OR_FALSE),
    "n_probs": Only((0,), "ask by logprobs"),
    # Where it runs.
    "id_slot": Tag((int,)),
    "keep_alive": Tag((str, int, float)),
    "options": Only(({},), "give what it holds as parameters of the request"),
    # Ours under other names.
    "n_predict": Means("max_tokens", _as_max_tokens),
    "repeat_penalty": Means("repetition_penalty"),
    "guided_json": _structured("json"),
    "guided_regex": _structured("regex"),
    "guided_choice": _structured("choice"),
    "guided_grammar": _structured("grammar"),
    "guided_decoding_backend": Tag(),
    "json_schema": _structured("json"),
    "grammar": Only(("",), "it would be GBNF; write it in Lark as structured_outputs.grammar"),
    # Our own, with values that mean ours.
    "top_k": Turned(((-1, 0),)),
    "seed": Turned(((-1, None),)),
    "stop": Turned((("", None),)),
}
"""Of chats and completions."""

CHAT: dict[str, Rule] = {
    **GENERATION,
    "max_tokens": Turned(((AS_MANY_AS_FIT, None),)),
    "max_completion_tokens": Turned(((AS_MANY_AS_FIT, None),)),
    "modalities": Only((["text"],), 'this server writes text only; send ["text"]'),
    "functions": Only(([],), "give them as tools"),
    "function_call": Only(("none", "auto"), "give tools and tool_choice"),
    "web_search_options": Only(({},), "nothing is fetched from anywhere; leave it out"),
    "logprobs": Turned(((0, False), (1, True))),
    "chat_template": Only(("",), "a template is taken from the checkpoint alone; leave it out"),
    "best_of": Only((1,), "use /v1/completions"),
    "echo": Only((False,), "use /v1/completions"),
    "prompt_logprobs": Only((), "use /v1/completions with echo and logprobs"),
    "separate_reasoning": Only((True,), "reasoning is always apart; leave it out or send true"),
    "include_reasoning": Only((True,), 'turn the reasoning off by reasoning_effort "none"'),
    "reasoning_format": Only(("auto", "deepseek"), "reasoning comes as reasoning_content; leave it out"),
    "think": Means("reasoning_effort", _effort_of),
    "thinking": Means("reasoning_effort", _effort_of),
    "reasoning": Means("reasoning_effort", _effort_of),
}

COMPLETIONS: dict[str, Rule] = {
    **GENERATION,
    "logprobs": Turned(((False, None),)),
    "suffix": Only(("",), "text cannot be filled in before it"),
    "prompt_logprobs": Only((), "use echo with logprobs"),
}

STREAM_OPTIONS: dict[str, Rule] = {"include_obfuscation": Only((False,), f"nothing is padded; {_LEAVE_OR_FALSE}")}

STRUCTURED_OUTPUTS: dict[str, Rule] = {
    "json_object": Means("json", lambda value: {"type": "object"} if value else None),
    "disable_fallback": Tag((bool,)),  # there is none
    "disable_any_whitespace": Only((False,), _LEAVE_OR_FALSE),
    "disable_additional_properties": Only((False,), "say additionalProperties: false in the schema"),
}

OLLAMA_OPTIONS: dict[str, Rule] = {
    **{name: rule for name, rule in GENERATION.items() if not (isinstance(rule, Means) or rule in TAGS.values())},
    "num_predict": Means("max_tokens", _num_predict),
    "repeat_penalty": Means("repetition_penalty"),
    "penalize_newline": Only((True,), "repetition_penalty is for all tokens alike"),
    # How it runs elsewhere.
    **dict.fromkeys(("num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread"), Tag((int,))),
    **dict.fromkeys(("numa", "low_vram", "f16_kv", "use_mmap", "use_mlock"), Tag((bool,))),
    **dict.fromkeys(("logits_all", "vocab_only", "embedding_only"), Only((False,), _LEAVE_OR_FALSE)),
}
"""Of `options` in Ollama's API."""

OLLAMA: dict[str, Rule] = {
    "keep_alive": Tag((str, int, float)),
    "logprobs": Only((False,), "use /v1/chat/completions"),
    "top_logprobs": Only((0,), "use /v1/chat/completions"),
    "format": Turned((("", None),)),
}
OLLAMA_GENERATE: dict[str, Rule] = {
    **OLLAMA,
    "suffix": Only(("",), "text cannot be filled in before it"),
    "template": Only(("",), "a template is taken from the checkpoint alone; leave it out"),
    "context": Only(([],), "nothing is stored; use /api/chat with all messages"),
    "images": Only(([],), "this server takes text only"),
    **dict.fromkeys(("width", "height", "steps"), Only((), "this server writes text only")),
}
OLLAMA_SHOW: dict[str, Rule] = {"verbose": Only((False,), "there is no more to tell; leave it out")}

ANTHROPIC: dict[str, Rule] = {
    **TAGS,
    "top_k": Turned(((-1, 0),)),
    "betas": Tag((list,)),
    "mcp_servers": Only(([],), "this server runs no tools; leave it out"),
    "container": Only((), "this server runs no code; leave it out"),
    "context_management": Only(({},), "a conversation is never changed; leave it out"),
    "cache_control": Tag((dict,)),  # what prompts have in common is always kept
    "diagnostics": Tag((dict,)),
    "inference_geo": Tag(),
    "speed": Tag(),
    "user_profile_id": Tag(),
    "workspace_id": Tag(),
}
"""Of /v1/messages."""

REASONING: dict[str, Rule] = {
    "summary": Only(("auto", "none"), "reasoning comes as it is; leave it out"),
    "generate_summary": Only(("auto", "none"), "reasoning comes as it is; leave it out"),
}
"""Of `reasoning` in /v1/responses."""

RESPONSES: dict[str, Rule] = {
    **TAGS,
    "max_output_tokens": Turned(((AS_MANY_AS_FIT, None),)),
    "max_tool_calls": Tag((int,)),
    "truncation": Only(("disabled",), 'a conversation is never cut; send "disabled"'),
    "background": Only((False,), "answers are not kept; leave it out or send false"),
    "previous_response_id": Only(("",), "nothing is stored; send the whole conversation as input"),
    "conversation": Only((), "nothing is stored; send the whole conversation as input"),
    "prompt": Only((), "no prompts are stored; send it as input"),
    "top_logprobs": Only((0,), "use /v1/chat/completions"),
}
