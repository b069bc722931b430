"""Times of linears on a GPU say which implementation is chosen for how many rows."""

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch

from nanoflow_compiler.kernel_choice import ATEN, Choice, LinearShape
from nanoflow_compiler.kernels import linear_timing
from nanoflow_compiler.kernels.linear_timing import ROW_RANGES, measure

FAST = Choice("few_rows")
SHAPE = LinearShape("linear_add", "bfloat16", 64, 32)


def test_ranges_hold_every_number_of_rows_once():
    assert ROW_RANGES[0][0] == 1
    assert all(last + 1 == first for (_, last), (first, _) in pairwise(ROW_RANGES))


class Setting:
    """Times by the number of rows, as they are set."""

    def __init__(self, times, rows):
        self.x = range(min(rows, 4096))
        self.times = times

    def time(self, choice):
        return self.times(len(self.x))[choice != ATEN]

    def unfused(self):
        return 1.0


def measured(monkeypatch, times):
    """``times(rows)`` are those of ATen's operations, and of the other choice."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(linear_timing, "choices", lambda _: [FAST])
    monkeypatch.setattr(linear_timing, "_setting", lambda _, last, __: Setting(times, last))
    return measure(SHAPE, device=torch.device("cpu"))


def test_the_fastest_is_chosen_by_range(monkeypatch):
    rows = measured(monkeypatch, lambda n: (1.0, 0.8 if n <= 8 else 1.3))
    assert [(row.rows_from, row.rows_to) for row in rows] == list(ROW_RANGES)
    assert {row.shape for row in rows} == {SHAPE}
    assert [row.choice for row in rows] == [FAST if last <= 8 else ATEN for _, last in ROW_RANGES]


def test_what_is_hardly_faster_is_not_chosen(monkeypatch):
    assert {row.choice for row in measured(monkeypatch, lambda _: (1.0, 0.99))} == {ATEN}


def test_what_loses_elsewhere_is_not_chosen(monkeypatch):
    """Where ATen's part of the operator costs more than the cluster that it would be in."""
    rows = measured(monkeypatch, lambda n: (1.2, 0.9 if n == 1 else 2.0))
    assert {row.choice for row in rows} == {ATEN}


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["linear", "linear_add", "gated_linear"])
def test_a_shape_is_measured(op):
    rows = measure(LinearShape(op, "bfloat16", 512, 1024), device=torch.device("cuda"))
    assert [(row.rows_from, row.rows_to) for row in rows] == list(ROW_RANGES)
