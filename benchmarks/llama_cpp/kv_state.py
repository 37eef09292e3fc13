"""A saved llama.cpp cache made longer by repeating its tokens, so that a deep cache needs no deep prefill.

The layout is that of llama.cpp's `llama_kv_cache::state_write`, for caches without values (latent attention).
"""

from __future__ import annotations

import struct

_HEAD = struct.Struct("<IiII")  # magic, sequence, streams, cells
_CELL = struct.Struct("<iIi")  # position, sequences, sequence
_LAYERS = struct.Struct("<II")  # are values transposed, layers
_ROWS = struct.Struct("<iQ")  # type, bytes of a row


def tile_state(state: bytes, tokens: int) -> bytes:
    """The saved cache of one sequence with `tokens` tokens, at positions 0 .. tokens - 1.

    Raises:
        ValueError: the state is not laid out as expected (another version of llama.cpp).
    """
    magic, sequence, streams, cells = _HEAD.unpack_from(state)
    at = _HEAD.size + cells * _CELL.size
    transposed, layers = _LAYERS.unpack_from(state, at)
    at += _LAYERS.size
    out = [_HEAD.pack(magic, sequence, streams, tokens)]
    out += [_CELL.pack(position, 1, sequence) for position in range(tokens)]
    out.append(_LAYERS.pack(transposed, layers))
    for _ in range(layers):
        kind, row_bytes = _ROWS.unpack_from(state, at)
        at += _ROWS.size
        rows = state[at : at + cells * row_bytes]
        at += len(rows)
        whole, rest = divmod(tokens, cells)
        out += [_ROWS.pack(kind, row_bytes), rows * whole, rows[: rest * row_bytes]]
    if streams != 1 or at != len(state):
        raise ValueError("This version of llama.cpp saves its cache in another layout.")
    return b"".join(out)
