"""Clusters that Inductor compiled, for sizes and layouts other than those of the trace."""

import re

import pytest
import sympy
import torch
from packaging.version import Version
from torch.nn.functional import scaled_dot_product_attention, silu

from nanoflow_compiler.backends import clusters
from nanoflow_compiler.backends.layouts import Layout, bind_symbols, python_text
from nanoflow_compiler.backends.unit import Unit
from nanoflow_compiler.errors import UnsupportedGraphError
from traces import trace

SIZES = [(4, 6), (2, 3), (5, 9), (3, 1000)]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_equals_eager(function, *, width, parts=2, sizes=SIZES):
    """``function(x [B, S, width])`` in parts of B, one graph for all B and S."""
    options = {"parts": parts}
    compiled = torch.compile(function, backend="nanoflow", options=options, fullgraph=True)
    with torch.no_grad():
        for batch, length in sizes:
            x = randn(batch, length, width)
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)
            torch.testing.assert_close(compiled(x), function(x), rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def norm(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def test_a_size_that_is_known_only_in_a_product():
    weight = randn(8, 8)

    def function(x):
        rows = x.reshape(-1, 8) @ weight
        return (silu(rows) * rows) @ weight

    assert_equals_eager(function, width=8)


def test_a_size_that_follows_from_others():
    weight, table = randn(8, 8), randn(1000, 8)

    def function(x):
        rows = (x.reshape(-1, 8) @ weight).view(x.shape)
        return (rows + table[: x.shape[1]]) @ weight

    assert_equals_eager(function, width=8)


def test_equal_clusters_that_return_different_nodes():
    first, second, last = randn(8, 8), randn(8, 8), randn(8, 8)

    def function(x):
        residual = x + norm(x) @ first
        middle = norm(residual)
        final = norm(residual + middle @ second)  # nobody reads the sum itself
        return final @ last

    assert_equals_eager(function, width=8)


def test_a_decomposition_that_keeps_another_layout():
    weight = randn(32, 32)

    def function(x):
        heads = (x @ weight).view(*x.shape[:2], 4, 8).transpose(1, 2)
        query = torch.cat([heads * 2, heads[..., 8:]], -1)  # one of the pieces is empty
        mixed = scaled_dot_product_attention(query, heads * 3, heads)
        return mixed.transpose(1, 2).reshape(x.shape) * 2

    assert_equals_eager(function, width=32)


def test_a_view_of_a_part_that_is_joined():
    weight = randn(8, 18)

    def function(x):
        left, right = (x @ weight).split([8, 10], -1)
        return left.cumsum(0) * 2, right + 1

    assert_equals_eager(function, width=8)


def test_sizes_beyond_what_inductor_assumed():
    def function(x):
        scores = (x * 2).transpose(1, 2).softmax(-1)
        return scores.sort(-1).values + 1

    assert_equals_eager(function, width=2, sizes=[(4, 6), (2, 40_000)])


@pytest.mark.parametrize("attempt", ["first", "second"])
def test_assumptions_are_checked_in_each_call(attempt):
    """The second time, the kernel comes from Inductor's cache, and what it assumes with it."""
    traced = trace(lambda x: (x.sort(0).values,), {"x": randn(6, 2)}, tokens={"x": 0})
    unit = Unit.of(traced.analyse(), traced.module)
    kernels = clusters.Kernels()
    (op,) = unit.ops.values()
    kernel = kernels.get(op, unit)
    (source,) = kernels.sources.values()
    if Version(torch.__version__) >= Version("2.12"):  # before, Inductor assumes nothing here
        assert re.search(r"if not \(args\[0\].shape\[0\] <=? \d+\):", source)
        assert "torch.ops.aten.sort" in source
    assert len(kernels.portable) == 1
    loaded = clusters.load_kernel(source)
    for rows in (5, 40_000):
        x = randn(rows, 2)
        assert torch.equal(kernel([x])[0], x.sort(0).values), attempt
        assert torch.equal(loaded([x])[0], x.sort(0).values)


def test_a_kernel_comes_back_from_its_source():
    traced = trace(lambda x: (silu(x * 3).view(-1, 2),), {"x": randn(6, 4)}, tokens={"x": 0})
    unit = Unit.of(traced.analyse(), traced.module)
    kernels = clusters.Kernels()
    (op,) = unit.ops.values()
    kernel = kernels.get(op, unit)
    assert len(kernels.portable) == 1
    loaded = clusters.load_kernel(*kernels.sources.values())
    for rows in (1, 5):
        x = randn(rows, 4)
        assert torch.equal(kernel([x])[0], loaded([x])[0])


def sizes_told_by(*sizes):
    """The symbols that layouts with such sizes tell for values that have them."""
    a, b, c = (sympy.Symbol(name, integer=True, positive=True) for name in "abc")
    numbers = {a: 5, b: 7, c: 11}
    exprs = [sympy.sympify(size(a, b, c)) for size in sizes]
    bound = bind_symbols([Layout((expr,), None) for expr in exprs])
    args = [int(expr.subs(numbers)) for expr in exprs]
    for before, after in zip(exprs, bound.layouts, strict=True):
        found = eval(python_text(after.sizes[0], bound.places), {"args": args})
        assert found == int(before.subs(numbers))
    return {str(symbol): eval(place, {"args": args}) for symbol, place in bound.places.items()}


def test_symbols_are_found_where_sizes_tell_them():
    assert sizes_told_by(lambda a, _b, _c: a, lambda a, b, _: 3 * a * b + a) == {"a": 5, "b": 7}
    assert sizes_told_by(lambda a, b, c: a * b * c, lambda _a, _b, c: c + 2) == {"c": 11, "b": 35}
    assert sizes_told_by(lambda a, b, _: a * b, lambda a, b, _: 2 * a * b) == {"b": 35}


def test_symbols_that_nothing_tells():
    with pytest.raises(UnsupportedGraphError, match=r"sizes a\*b, a\*\*2\*b do not tell what a is"):
        sizes_told_by(lambda a, b, _: a * b, lambda a, b, _: a * a * b)


def test_without_a_compiler_clusters_run_as_they_are():
    settings = {"cpp.cxx": ("/no/such/compiler",), "fx_graph_cache": False}
    told = r"cluster_0 .* runs uncompiled: InvalidCxxCompiler"
    with torch._inductor.config.patch(settings), pytest.warns(UserWarning, match=told):
        assert_equals_eager(lambda x: silu(x * 2.71) * x + 1, width=4)
