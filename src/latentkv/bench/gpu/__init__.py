"""Attention on a GPU, and the search for its block sizes."""
