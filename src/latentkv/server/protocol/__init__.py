"""What requests and answers look like: OpenAI's API, and the few parameters beyond it that vLLM's clients know too."""
