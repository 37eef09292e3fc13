"""The one record of a conversion and of its healing, beside the weights: report.json, and report.html for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentkv.convert.page import render_page
from latentkv.errors import CheckpointError
from latentkv.files import write_json, write_text
from latentkv.json_files import read_json
from latentkv.saved_values import saved_in

REPORT_FILE = "report.json"
PAGE_FILE = "report.html"


def read_record(folder: Path) -> dict[str, Any]:
    """What is known of the conversion in `folder`; empty where nothing is."""
    path = folder / REPORT_FILE
    return read_json(path, CheckpointError) if path.is_file() else {}


def require_record(folder: Path) -> None:
    """Refuse a record that cannot be added to, before the work that is to be noted in it.

    Raises:
        LatentKVError: the file is damaged, named.
    """
    record = read_record(folder)
    with saved_in(folder / REPORT_FILE, CheckpointError, "remove it, and the model stays without its report"):
        if not isinstance(record.get("healings", []), list):
            raise TypeError("healings is no list")
        if record:
            render_page(record)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write both files, each whole or not at all."""
    write_json(folder / REPORT_FILE, record)
    write_text(folder / PAGE_FILE, render_page(record))


def note(folder: Path, **facts: Any) -> None:
    """Add to the record, in place of facts of the same name."""
    write_record(folder, read_record(folder) | facts)


def add_healing(folder: Path, healing: Mapping[str, Any], *, number: int) -> None:
    """Add the healing that `number` others came before."""
    earlier = read_record(folder).get("healings", [])
    note(folder, healings=[*earlier[:number], healing])
