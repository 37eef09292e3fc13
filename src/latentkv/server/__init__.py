"""HTTP in, words out: an OpenAI-compatible server in front of one engine."""
