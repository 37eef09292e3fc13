"""What a model's numbers depend on, in one digest: pages with the same digest and the same text are the same."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import torch

from latentkv import kernels
from latentkv.models.decoder import Decoder
from latentkv.models.packing import Packing
from latentkv.models.rope import attention_factor, inverse_frequencies

_PACKAGE = Path(__file__).parent.parent
_COMPUTES = ("checkpoint", "models", "ops", "weights")


def model_fingerprint(decoder: Decoder, weights: bytes, *, packing: Packing | None, int8_products: bool) -> bytes:
    """SHA-256 of all that decides what the model writes into its cache for a text.

    That is the weights, the config and what was made of it, dtype, packing and device, the frequencies that were chosen
    for its longest context, and the program: its files, torch's version and the kernels' instruction set.

    Args:
        decoder: the model.
        weights: digest of its weights' bytes.
        packing: how they were packed as they were loaded.
        int8_products: whether it attends to int8 pages in int8 products.
    """
    config = decoder.config
    parts = (
        weights,
        repr(config).encode(),
        json.dumps(dict(config.source), sort_keys=True).encode(),
        repr((decoder.dtype, next(decoder.parameters()).device.type, packing, int8_products)).encode(),
        inverse_frequencies(config.rope, max_context=decoder.max_context).numpy().tobytes(),
        repr(attention_factor(config.rope)).encode(),
        repr((torch.__version__, kernels.current_backend())).encode(),
        program_digest(),
    )
    return sha256(b"".join(sha256(part).digest() for part in parts)).digest()


def program_digest() -> bytes:
    """SHA-256 of the code that makes a model's weights and computes with them: Python's, and the kernels."""
    files = [file for part in _COMPUTES for file in sorted((_PACKAGE / part).rglob("*.py"))]
    if kernels.extension is not None:
        files.append(Path(kernels.extension.__file__))
    return sha256(b"".join(sha256(file.read_bytes()).digest() for file in files)).digest()
