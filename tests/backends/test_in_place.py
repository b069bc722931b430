"""Sums that take the place of their residual: only where nobody can see the difference."""

import pytest
import torch
from torch import fx

from nanoflow_compiler import fused_ops
from nanoflow_compiler.backends.unit import may_overwrite
from nanoflow_compiler.engine.llm import LLM
from tiny_models import BUILDERS


def graph_of(function):
    return fx.symbolic_trace(function).graph


def sums(graph):
    """Of each sum whether it may overwrite its residual, in a program of the graph's order."""
    found, launched = [], set()
    for node in graph.nodes:
        if node.target is fused_ops.linear_add:
            found.append(may_overwrite(node, launched=launched))
        launched.add(node)
    return found


def two_sums(between, *, after=None):
    def function(x, w, v):
        first = torch.ops.nanoflow.linear_add.default(x, x, w)
        seen = between(first, v)
        second = torch.ops.nanoflow.linear_add.default(first, seen, w)
        return second if after is None else (second, after(first, v))

    return sums(graph_of(function))


def norm(x, v):
    return torch.ops.nanoflow.rms_norm.default(x, v, 1e-6, False)


def view(x, v):
    del v
    return torch.ops.aten.view.default(x, [-1])


def first_of(x, v):
    del v
    return x


def test_a_sum_that_only_a_norm_has_read_is_overwritten():
    assert two_sums(norm) == [False, True]  # the first adds to an input


@pytest.mark.parametrize("between", [view, lambda x, v: torch.ops.aten.add.Tensor(x, v)])
def test_one_that_something_else_reads_is_not(between):
    assert two_sums(between) == [False, False]


def test_one_that_is_read_afterwards_is_not():
    assert two_sums(norm, after=norm) == [False, False]


def test_one_that_is_returned_is_not():
    assert two_sums(norm, after=first_of) == [False, False]


def test_one_that_is_also_multiplied_is_not():
    assert two_sums(first_of) == [False, False]


class ReadLate(torch.nn.Module):
    """Its first sum is read by one that waits for a cluster, and the cluster for another sum."""

    def __init__(self):
        super().__init__()
        self.linears = torch.nn.ModuleList(torch.nn.Linear(32, 32, bias=False) for _ in range(5))

    def forward(self, x, y, z, v):
        one, two, three, four, five = self.linears
        first = x + one(y)
        waiting = torch.sin(four(torch.cos(three(z))))
        late = waiting + five(first)
        return late, waiting + 2 * (first + two(v))


def test_a_program_launches_in_another_order_than_the_graph():
    torch.manual_seed(0)
    model = ReadLate().eval()
    xs = [torch.randn(8, 32) for _ in range(4)]
    torch._dynamo.reset()
    options = {"kernels": "own", "clusters": "eager", "parts": 1}
    with torch.inference_mode():
        found = torch.compile(model, backend="nanoflow", options=options)(*xs)
        for actual, expected in zip(found, model(*xs), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("parts", "lanes", "expected"), [(1, 1, True), (2, 1, False)])
def test_only_programs_that_run_whole_and_in_order(parts, lanes, expected):
    options = {"parts": parts, "lanes": lanes, "clusters": "eager", "kernels": "own"}
    with LLM(BUILDERS["llama"](), options=options | {"cache": False}) as llm:
        source = llm._core.runner.forward.step.source
    assert ("ops.nanoflow.linear_add_.default(" in source) == expected
    assert "ops.nanoflow.linear_add.default(" in source
