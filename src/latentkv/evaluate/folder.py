"""The folder of an evaluation: evaluation.json, which one that was interrupted goes on from, and evaluation.html."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentkv.errors import RequestError
from latentkv.evaluate.found import Found
from latentkv.evaluate.page import render_page
from latentkv.evaluate.report import Report
from latentkv.files import write_json, write_text
from latentkv.json_files import INDEX_BYTES, read_json
from latentkv.saved_values import as_saved, saved_in
from latentkv.targets import require_folder

REPORT_FILE = "evaluation.json"
PAGE_FILE = "evaluation.html"
_REMEDY = "remove it, and the same command begins anew"


class EvaluationFolder:
    """Where an evaluation is kept.

    Args:
        out: a new folder, or that of the same evaluation.

    Raises:
        RequestError: it cannot be written, or holds something else.
    """

    def __init__(self, out: Path) -> None:
        require_folder(out, RequestError)
        if out.exists() and not (out / REPORT_FILE).exists() and any(out.iterdir()):
            raise RequestError(f"{out} holds something else than an evaluation: give a new folder as --out.")
        self.out = out

    def found(self, asked: Mapping[str, Any]) -> Found:
        """What an earlier run has found that was asked the same; nothing in a new folder.

        Raises:
            RequestError: it was asked something else, or the file is damaged.
        """
        path = self.out / REPORT_FILE
        if not path.exists():
            return Found()
        content = read_json(path, RequestError, most_bytes=INDEX_BYTES, remedy=_REMEDY)
        with saved_in(path, RequestError, _REMEDY):
            before = content["asked"]
            for name, value in asked.items():
                if before.get(name) != value:
                    raise RequestError(f"{self.out} holds an evaluation with another {name}: name another folder.")
            return as_saved(Found, content["found"])

    def write(self, report: Report, found: Found, asked: Mapping[str, Any]) -> None:
        """Write both files, each whole or not at all."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / REPORT_FILE, report.as_json(found) | {"asked": dict(asked)})
        write_text(self.out / PAGE_FILE, render_page(report))
