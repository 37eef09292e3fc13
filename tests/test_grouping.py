"""Tests that run side by side are grouped: those of a file run in one process, and so do those that share a server."""

from __future__ import annotations

import os

import pytest


def test_a_group_of_tests_stays_in_one_process(request: pytest.FixtureRequest) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("all tests run in this one process")
    # pytest-xdist hands tests out by what follows the @; where it puts none there, each goes to any process.
    assert request.node.nodeid.endswith(f"@{request.path.name}")
