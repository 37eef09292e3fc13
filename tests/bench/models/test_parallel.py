"""Pipelines as they are simulated take the time that the plan computes for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import run_here
from latentkv.bench.models.parallel import simulate
from latentkv.errors import ConfigError

NETWORKS = ("10Gb:60us", "1Gb:5000us")


@pytest.mark.parametrize("ranks", [1, 2, 5, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("batch", [1, 7, pytest.param(32, marks=pytest.mark.slow)])
def test_the_plan_holds_to_15_percent(ranks: int, batch: int):
    report = simulate(ranks=[ranks], batches=[batch], networks=NETWORKS, num_layers=max(8, 2 * ranks), new_tokens=10)
    assert [row.network for row in report.rows] == list(NETWORKS)
    for row in report.rows:
        assert 0.85 < row.ratio < 1.15, row


def test_many_stages_work_at_once_and_one_sequence_has_one_of_them():
    (alone, many) = simulate(ranks=[4], batches=[1, 8], networks=NETWORKS[:1], num_layers=8, new_tokens=10).rows
    (one,) = simulate(ranks=[1], batches=[1], networks=NETWORKS[:1], num_layers=8, new_tokens=10).rows
    assert alone.simulated == pytest.approx(one.simulated, rel=0.02)
    assert many.simulated > 3 * alone.simulated


def test_the_command_prints_and_keeps_what_was_simulated(tmp_path: Path):
    result = run_here("bench", "parallel", "--ranks", "2", "--batch", "2", "--json", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    assert "simulated" in result.output and "1Gb:2000us" in result.output
    assert len(json.loads((tmp_path / "found.json").read_text())["rows"]) == 2


def test_more_ranks_than_layers_are_refused():
    with pytest.raises(ConfigError, match="8 stages at most, not 9"):
        simulate(ranks=[9], batches=[1], networks=NETWORKS, num_layers=8)
