"""The files beside a checkpoint's weights and config that a copy of it needs as well: tokenizer, templates, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

from latentkv.files import write_whole

_PATTERNS = (
    "tokenizer*",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*processor_config.json",
    "LICENSE*",
)


def copy_companions(source: Path, target: Path) -> None:
    """Copy them, each whole or not at all.

    Raises:
        OSError: a file cannot be read or written.
    """
    for path in sorted({path for pattern in _PATTERNS for path in source.glob(pattern) if path.is_file()}):
        write_whole(target / path.name, lambda temporary, path=path: shutil.copyfile(path, temporary))
