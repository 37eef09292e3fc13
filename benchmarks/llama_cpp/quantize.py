"""Quantise a GGUF file as `llama-quantize` does, by llama-cpp-python.

python quantize.py MODEL.gguf OUT.gguf TYPE   Q8_0, Q4_K_M and so on; MODEL is of `latentkv quantize --type bf16`
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import llama_cpp

_PREFIX = "LLAMA_FTYPE_MOSTLY_"
TYPES = {name.removeprefix(_PREFIX): getattr(llama_cpp, name) for name in dir(llama_cpp) if name.startswith(_PREFIX)}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a GGUF file of F32, F16 or BF16")
    parser.add_argument("out", type=Path)
    parser.add_argument("type", choices=TYPES)
    parser.add_argument("--threads", type=int, default=0, help="0: all")
    args = parser.parse_args()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = TYPES[args.type], args.threads
    if llama_cpp.llama_model_quantize(str(args.source).encode(), str(args.out).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not quantise {args.source}.")


if __name__ == "__main__":
    main()
