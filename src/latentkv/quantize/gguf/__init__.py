"""A checkpoint as one GGUF file, as llama.cpp runs it: the mirror of `checkpoint.gguf` and `text.gguf_tokenizer`."""

from latentkv.quantize.gguf.mix import GGUF_TYPES, require_gguf_type
from latentkv.quantize.gguf.vocabulary import NO_TOKENIZER
from latentkv.quantize.gguf.write import GGUFPlan, plan_gguf, require_new_file, write_gguf

__all__ = ["GGUF_TYPES", "NO_TOKENIZER", "GGUFPlan", "plan_gguf", "require_gguf_type", "require_new_file", "write_gguf"]
