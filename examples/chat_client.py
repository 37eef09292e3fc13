"""A question to a served model through OpenAI's own package, the answer printed as it comes.

Serve a model in another terminal (latentkv serve), then run it: python examples/chat_client.py [QUESTION] [URL]
It needs the package: pip install openai
"""

import sys

from openai import OpenAI


def main(question: str = "Who is there?", url: str = "http://127.0.0.1:8000/v1") -> None:
    """Ask the only model that the server has."""
    client = OpenAI(base_url=url, api_key="unused")
    model = client.models.list().data[0].id
    print(f"{model}: ", end="")
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=60,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage:
            print(f"\n({chunk.usage.prompt_tokens} tokens read, {chunk.usage.completion_tokens} written)")


if __name__ == "__main__":
    main(*sys.argv[1:])
