"""docs/reliability.md, lines 12, 13 and 17: what ruff cannot see in the source; the rest is its rules S and TID251."""

from __future__ import annotations

import re
from pathlib import Path

import latentkv

CODE_OF_A_CHECKPOINT = re.compile(r"""trust_remote_code["']?\s*[=:](?!\s*False\b)""")


def test_line_17_the_code_of_a_checkpoint_is_never_trusted() -> None:
    files = sorted(Path(latentkv.__file__).parent.rglob("*.py"))
    assert len(files) > 100
    assert [path.name for path in files if CODE_OF_A_CHECKPOINT.search(path.read_text("utf-8"))] == []
