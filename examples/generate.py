"""Text from Python: several prompts at once, one streamed, one that must be valid JSON.

Run it: python examples/generate.py [MODEL]    (a folder, a GGUF file or a repo id; default: the model in the package)
"""

import sys

from latentkv import LLM, SamplingParams, Structure

SHAPE = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def main(model: str | None) -> None:
    """Print what the model writes."""
    llm = LLM(model) if model else LLM()
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=7)

    print("# Two prompts, which run together; each gets the text that it would get alone")
    for completion in llm.generate(["It was a dark night", "The old lady"], params):
        print(f"{completion.text!r} ({completion.finish_reason})")

    print("# One, as it comes")
    for piece in llm.stream("My dear Watson", params):
        print(piece.text, end="", flush=True)
    print()

    print("# JSON that the schema validates")
    params = SamplingParams(max_tokens=64, temperature=0.8, seed=7, structure=Structure.json_schema(SHAPE))
    print(llm.generate("The captain, as JSON: ", params)[0].text)

    print(f"# The cache took {llm.cache.bytes_per_token} bytes per token")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
