"""Random workloads: whatever comes, ends, is given up or pushed out, every request gets the tokens it gets alone."""

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from workloads import HybridWorkload, RanksHybridWorkload, RanksWorkload, StoredHybridWorkload, StoredWorkload, Workload

Workload.TestCase.settings = settings(max_examples=10, stateful_step_count=25, deadline=None)
HybridWorkload.TestCase.settings = settings(max_examples=8, stateful_step_count=25, deadline=None)
StoredHybridWorkload.TestCase.settings = settings(max_examples=8, stateful_step_count=25, deadline=None)
StoredWorkload.TestCase.settings = settings(max_examples=10, stateful_step_count=30, deadline=None)
RanksWorkload.TestCase.settings = settings(max_examples=8, stateful_step_count=25, deadline=None)
RanksHybridWorkload.TestCase.settings = settings(max_examples=4, stateful_step_count=25, deadline=None)
TestWorkload = Workload.TestCase
TestHybridWorkload = HybridWorkload.TestCase
TestStoredHybridWorkload = StoredHybridWorkload.TestCase
TestStoredWorkload = StoredWorkload.TestCase
TestRanksWorkload = RanksWorkload.TestCase
TestRanksHybridWorkload = RanksHybridWorkload.TestCase


@pytest.mark.slow
@pytest.mark.parametrize(
    "machine",
    [Workload, StoredWorkload, HybridWorkload, StoredHybridWorkload, RanksWorkload, RanksHybridWorkload],
)
def test_500_workloads(machine: type[RuleBasedStateMachine]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=500, stateful_step_count=25, deadline=None))
