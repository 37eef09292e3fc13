"""GGUF, the files of llama.cpp: what they hold, and what their types of tensors mean."""
