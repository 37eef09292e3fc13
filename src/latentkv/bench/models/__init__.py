"""Whole models: prompts, decoding, drafts, starts, several processes."""
