"""MLA models of Hugging Face transformers, decoded absorbed: `accelerate(model)` and nothing else changes.

What it patches is said in docs/transformers.md.
"""

from latentkv.transformers.accelerate import accelerate, restore

__all__ = ["accelerate", "restore"]
