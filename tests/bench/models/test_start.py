from pathlib import Path

import pytest

from latentkv.bench.models.start import measure_start
from latentkv.errors import RequestError


@pytest.mark.slow
def test_starts_are_measured_beside_import_torch() -> None:
    rounds: list[str] = []
    report = measure_start([], name="the embedded model", repeats=1, progress=rounds.append)
    assert [start.name for start in report.starts] == ["import torch", "packed anew", "mapped"]
    assert all(start.seconds > 0 and start.cpu_seconds > 0 for start in report.starts)
    assert rounds == ["round 1 of 1"]


@pytest.mark.slow
def test_a_start_that_fails_says_what_the_command_said(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^no folder"):
        measure_start(["--model", str(tmp_path / "nothing")], name="nothing", repeats=1)
