"""A checkpoint as one GGUF file, as llama.cpp runs it: the mirror of `checkpoint.gguf` and `text.gguf_tokenizer`."""

from latentkv.quantize.gguf.mix import GGUF_TYPES, require_gguf_type
from latentkv.quantize.gguf.write import GGUFCopy, quantize_to_gguf

__all__ = ["GGUF_TYPES", "GGUFCopy", "quantize_to_gguf", "require_gguf_type"]
