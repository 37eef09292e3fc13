"""Moving tensors without waiting."""

from __future__ import annotations

import pytest
import torch

from latentkv.models.transfer import take_rows


@pytest.mark.parametrize("rows", [[0, 1, 2], [2], [1, 0], [0, 0, 2], [], [0, 1]])
def test_rows_are_taken_in_the_order_asked_for(rows: list[int]) -> None:
    values = torch.arange(6).reshape(3, 2)
    assert take_rows(values, rows).tolist() == [values[row].tolist() for row in rows]
