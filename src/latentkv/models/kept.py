"""A decoder whose packed weights lie in a file that was written at its first start, and are mapped at each start.

The first start writes the file part by part, so that memory never holds more than one part, and then maps it as every
other start does: there is one way into a model. `weights/packed_file.py` is the file, `weights/packed_folder.py` where
it lies; here is what goes into it, and when it may be believed.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256

import torch

from latentkv import kernels
from latentkv.checkpoint.locate import CONFIG_FILE, INDEX_FILE
from latentkv.checkpoint.names import layer_of, mtp_index
from latentkv.checkpoint.quantization import QUANTIZATION_FILES
from latentkv.checkpoint.tensors import Tensors
from latentkv.models.config import ModelConfig
from latentkv.models.decoder import Decoder
from latentkv.models.fingerprint import program_digest
from latentkv.models.loading import empty_decoder, load_part, match_decoder, pack_tied_head
from latentkv.models.packing import Packer, Packing, Weight, pack_module
from latentkv.models.stage import Stage
from latentkv.models.stored_config import stored_dtype
from latentkv.weights import PackedWeight
from latentkv.weights.packed_file import DamagedPackedFileError, PackedFile, PackedFileWriter
from latentkv.weights.packed_folder import NoRoomError, PackedFolder

logger = logging.getLogger("latentkv.models")

_CLOCK_TICK = 0.05
"""Seconds within which a file system may give two changes of a file the same time."""

_WORTH_SAYING = 1 << 30
"""Bytes of a file from which on it is said that it takes room on the disk."""

_BITS, _COMPACT_BITS = 16, 12
"""Of a weight that is not quantised."""


def load_kept(
    config: ModelConfig,
    reader: Tensors,
    folder: PackedFolder,
    packing: Packing,
    *,
    dtype: torch.dtype | None,
    max_context: int | None,
    stage: Stage | None = None,
) -> tuple[Decoder, PackedFile] | None:
    """A packed decoder on the CPU, as `load_model` gives it, mapped from its file in `folder`; see there.

    Returns:
        The decoder in eval mode and its file; None where the file cannot be kept, which a warning says.

    Raises:
        CheckpointError: weights are missing, unexpected, damaged or misshapen.
    """
    dtype = dtype or stored_dtype(config)
    try:
        identity = _identity(reader)
        key = kept_key(config, identity, packing, dtype, stage)
        for _ in range(2):  # a file that is damaged is written anew
            if (file := folder.find(key)) is None:
                _require_room(reader, packing, folder, stage)
                # Opened anew: what was open before may be a file that had the name before.
                _write(config, reader.reopened(), identity, folder, key, packing, dtype, stage)
                file = folder.find(key)
                if file is not None and file.nbytes >= _WORTH_SAYING:
                    logger.warning(
                        "%.1f GiB of packed weights are kept in %s for the next start (--no-packed-dir: none).",
                        file.nbytes / 2**30,
                        folder.path,
                    )
            try:
                if file is not None:
                    return _mapped(config, file, packing, dtype=dtype, max_context=max_context, stage=stage), file
            except DamagedPackedFileError as error:
                folder.refuse(key, error)
    except (OSError, NoRoomError) as error:
        reason = getattr(error, "strerror", None) or error
        logger.warning("The packed weights of %s are not kept for the next start: %s.", reader.folder, reason)
    return None


def kept_key(
    config: ModelConfig, identity: str, packing: Packing, dtype: torch.dtype, stage: Stage | None = None
) -> bytes:
    """SHA-256 of all that packed weights depend on.

    Args:
        config: the model's.
        identity: of the files that the weights are read from.
        packing: how they are packed.
        dtype: of what is not packed.
        stage: the layers that they belong to; None: all.
    """
    stage = None if stage is None or stage.is_whole else stage
    parts = (
        identity.encode(),
        repr(config).encode(),
        json.dumps(dict(config.source), sort_keys=True).encode(),
        repr((replace(packing, rounds_input=False), dtype, torch.__version__, kernels.current_backend())).encode(),
        repr(stage).encode(),
        program_digest(),
    )
    return sha256(b"".join(sha256(part).digest() for part in parts)).digest()


def _identity(reader: Tensors) -> str:
    """What changes when a model's files do, without reading them.

    Their sizes, inodes and times of change, which no program can set; a file changed so lately that a second change
    could bear the same time is waited for.

    Raises:
        OSError: a file cannot be looked at.
    """
    said = (CONFIG_FILE, INDEX_FILE, *QUANTIZATION_FILES)
    beside = [path for name in said if (path := reader.folder / name).exists()]
    states: list[tuple[object, ...]] = []
    for path in [*reader.files, *beside]:
        path = path.resolve()
        found = path.stat()
        if _is_fresh(found):
            time.sleep(_CLOCK_TICK)
            if _is_fresh(found := path.stat()):
                raise BlockingIOError(errno.EBUSY, "it is being written", str(path))
        states.append((str(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
    return repr(states)


def _is_fresh(found: os.stat_result) -> bool:
    return 0 <= time.time() - found.st_ctime < _CLOCK_TICK


def _require_room(reader: Tensors, packing: Packing, folder: PackedFolder, stage: Stage | None) -> None:
    """Raise `NoRoomError` where a model will not fit, before all of it is packed in vain."""
    names = [name for name in reader.names if stage is None or _of_stage(name, stage)]
    weights = sum(math.prod(reader.shape(name)) for name in names)
    plain = _COMPACT_BITS if packing.compact else _BITS
    bits = plain if packing.format is None else packing.format.bits
    least = min(sum(reader.nbytes(name) for name in names), weights * bits // 8)
    if least > (most := folder.most_bytes()):
        raise NoRoomError(f"they take about {least:,} bytes, and {folder.path} may hold {most:,}")


def _write(
    config: ModelConfig,
    reader: Tensors,
    identity: str,
    folder: PackedFolder,
    key: bytes,
    packing: Packing,
    dtype: torch.dtype,
    stage: Stage | None,
) -> None:
    decoder, match = match_decoder(config, reader, dtype=dtype, max_context=None, stage=stage)
    with folder.writing(key) as writer:
        packer_of = partial(_WritingPacker, writer=writer)
        for name, part in decoder.parts():
            load_part(name, part, match, torch.device("cpu"), packing, packer_of)
            state = part.state_dict()
            for leaf, tensor in state.items():
                writer.add(f"{name}.{leaf}", tensor)
            if part is not decoder.model.embed_tokens:  # from which a tied head is packed
                part.load_state_dict(
                    {leaf: torch.empty_like(t, device="meta") for leaf, t in state.items()}, assign=True
                )
        pack_tied_head(decoder, match, packing, packer_of)
        if _identity(reader) != identity:
            raise BlockingIOError(errno.EBUSY, "its files changed while they were read", str(reader.folder))


def _mapped(
    config: ModelConfig,
    file: PackedFile,
    packing: Packing,
    *,
    dtype: torch.dtype,
    max_context: int | None,
    stage: Stage | None,
) -> Decoder:
    decoder = empty_decoder(config, dtype=dtype, max_context=max_context)
    decoder.drop_mtp_modules(keep={k for name in file.names if (k := mtp_index(name)) is not None})
    if stage is not None:
        decoder.keep_stage(stage)
    pack_module(decoder, packing, packer_of=partial(_MappedPacker, file=file))
    state = {name: file.tensor(name, meta.shape, meta.dtype) for name, meta in decoder.state_dict().items()}
    decoder.load_state_dict(state, assign=True)
    return decoder.eval()


def _of_stage(name: str, stage: Stage) -> bool:
    layer = layer_of(name)
    return stage.is_first if layer is None or layer >= stage.num_layers else stage.first <= layer < stage.last


@dataclass(frozen=True)
class _WritingPacker(Packer):
    """Writes what is packed to a file, and lets go of it."""

    writer: PackedFileWriter = field(kw_only=True)

    def made(self, name: str, shape: Sequence[int], weight: Callable[[], Weight]) -> PackedWeight:
        packed = super().made(name, shape, weight)
        self.writer.add(self.prefix + name, packed)
        return replace(packed, data=packed.data.new_empty(0))


@dataclass(frozen=True)
class _MappedPacker(Packer):
    """Takes what was packed from a file; the weights of its module have no storage."""

    file: PackedFile = field(kw_only=True)

    def made(self, name: str, shape: Sequence[int], weight: Callable[[], Weight]) -> PackedWeight:
        return self.file.packed(self.prefix + name, shape)
