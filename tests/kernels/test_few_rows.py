"""Products of few rows on a GPU against float64, with memory around them that would show."""

import pytest
import torch

from nanoflow_compiler.experts import ACTIVATIONS

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
GATES = ["silu", "gelu", "gelu_tanh"]
SIZES = [(64, 48), (96, 33), (520, 200), (4096, 1000), (14336, 40)]
"""Depth and columns."""
WAYS = [(1, False), (2, False), (3, False), (4, False), (1, True), (5, True), (16, True)]
"""Rows, and whether tensor cores multiply them."""


def relative_error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def tiling(uses_dot, **given):
    from nanoflow_compiler.kernels.few_rows import FewRowsTiling

    return FewRowsTiling(16, 128, 4, 4, uses_dot=uses_dot, **given)


class Product:
    """Random rows and weights; the rows, the residual and the result have others between them."""

    def __init__(self, rows, depth, columns, *, gated=False, dtype=torch.bfloat16):
        self.generator = torch.Generator("cuda").manual_seed(rows + depth + columns)
        self.dtype, self.rows, self.columns = dtype, rows, columns
        outer = 2 * columns if gated else columns
        self.x = self.random(rows, depth + 24)[:, :depth]
        self.weight = self.random(outer, depth) / depth**0.5
        self.bias = self.random(outer)
        self.residual = self.random(rows, columns + 3)[:, :columns]

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator, device="cuda").to(self.dtype)

    def run(self, function, **given):
        around = self.x.new_full((self.rows + 2, self.columns + 16), torch.nan)
        out = around[1:-1, :-16]
        assert function(self.x, self.weight, out=out, **given) is out
        found = out.clone()
        out.fill_(torch.nan)
        assert around.isnan().all()
        assert not found.isnan().any()
        return found

    def product(self, x=None):
        """Rounded as eager rounds it."""
        product = (self.x if x is None else x).double() @ self.weight.double().T
        return product.to(self.dtype)

    def with_bias(self):
        product = self.x.double() @ self.weight.double().T + self.bias.double()
        return product.to(self.dtype)

    def check(self, found, expected):
        assert relative_error(found, expected) < TOLERANCE[self.dtype]


def gated(product, activation):
    gate, up = product.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize(("depth", "columns"), SIZES)
@pytest.mark.parametrize(("rows", "uses_dot"), WAYS)
def test_a_plain_product(rows, uses_dot, depth, columns, pdl, dtype):
    from nanoflow_compiler.kernels.few_rows import multiply

    case = Product(rows, depth, columns, dtype=dtype)
    given = {"tiling": tiling(uses_dot), "pdl": pdl}
    case.check(case.run(multiply, **given), case.product())


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("rows", "uses_dot"), WAYS)
def test_a_residual_is_added_to_what_was_rounded(rows, uses_dot, has_bias):
    from nanoflow_compiler.kernels.few_rows import multiply

    case = Product(rows, 520, 200)
    given = {"bias": case.bias} if has_bias else {}
    # So large that whatever is rounded differently shows.
    case.residual.mul_(64)
    found = case.run(multiply, tiling=tiling(uses_dot), residual=case.residual, **given)
    expected = case.residual + (case.with_bias() if has_bias else case.product())
    assert (found != expected).float().mean() < 0.02
    case.check(found, expected)


def test_the_result_may_replace_the_residual():
    from nanoflow_compiler.kernels.few_rows import multiply

    case = Product(2, 520, 200)
    expected = multiply(case.x, case.weight, residual=case.residual)
    own = case.residual
    assert multiply(case.x, case.weight, residual=own, out=own) is own
    assert torch.equal(own, expected)


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("rows", "uses_dot"), WAYS)
def test_a_gate(rows, uses_dot, has_bias, activation):
    from nanoflow_compiler.kernels.few_rows import multiply_gated

    case = Product(rows, 520, 200, gated=True)
    bias = {"bias": case.bias} if has_bias else {}
    given = {"tiling": tiling(uses_dot), "activation": activation, "pdl": True}
    expected = gated(case.with_bias() if has_bias else case.product(), activation)
    case.check(case.run(multiply_gated, **given, **bias), expected)


@pytest.mark.parametrize(("adds_one", "rounds_last"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("depth", [96, 4096, 5000])
@pytest.mark.parametrize("is_gated", [False, True])
def test_norms_inside(rows, depth, adds_one, rounds_last, is_gated):
    from nanoflow_compiler.kernels import few_rows
    from nanoflow_compiler.kernels.norm import RmsNorm, rms_norm

    case = Product(rows, depth, 72, gated=is_gated)
    norm = RmsNorm(case.random(depth), 1e-5, adds_one, rounds_last)
    expected = case.product(rms_norm(case.x, norm)[0])
    given = {"norm": norm, "pdl": True}
    if is_gated:
        found = case.run(few_rows.multiply_gated, activation="silu", **given)
        case.check(found, gated(expected, "silu"))
    else:
        case.check(case.run(few_rows.multiply, **given), expected)


@pytest.mark.parametrize("at", range(9))
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_all_tilings(at, rows):
    from nanoflow_compiler.kernels.few_rows import (
        MOST_ADDED_ROWS,
        TILINGS,
        multiply,
        multiply_gated,
    )

    assert len(TILINGS) == 9
    if not TILINGS[at].uses_dot and rows > MOST_ADDED_ROWS:
        pytest.skip("rows that need tensor cores")
    plain, gates = Product(rows, 1000, 200), Product(rows, 1000, 200, gated=True)
    plain.check(plain.run(multiply, tiling=TILINGS[at], pdl=True), plain.product())
    found = gates.run(multiply_gated, tiling=TILINGS[at], activation="silu", pdl=True)
    gates.check(found, gated(gates.product(), "silu"))


@pytest.mark.parametrize("begins_early", [False, True])
@pytest.mark.parametrize("prefetch", [0, 8, 1024, 1 << 20])
@pytest.mark.parametrize("uses_dot", [False, True])
def test_what_is_asked_for_early_changes_nothing(uses_dot, prefetch, begins_early):
    from nanoflow_compiler.kernels.few_rows import multiply

    case = Product(1, 1000, 200)
    plain = case.run(multiply, tiling=tiling(uses_dot))
    changed = tiling(uses_dot, prefetch=prefetch, begins_early=begins_early)
    assert torch.equal(case.run(multiply, tiling=changed, pdl=True), plain)


def test_what_cannot_be_multiplied():
    from nanoflow_compiler.kernels.few_rows import can_gate_product, can_multiply
    from nanoflow_compiler.kernels.norm import RmsNorm

    case = Product(4, 128, 64)
    x, weight = case.x, case.weight
    assert can_multiply(x, weight, norm=RmsNorm(case.random(128), 1e-5))
    assert can_gate_product(x, weight, activation="gelu")
    assert not can_gate_product(x, weight, activation="relu")
    assert not can_gate_product(x, weight[:63], activation="silu")
    assert not can_multiply(x, weight, norm=RmsNorm(case.random(128).float(), 1e-5))
    assert not can_multiply(x.repeat(5, 1), weight)
    assert not can_multiply(x[:0], weight)
    assert not can_multiply(x.float(), weight.float())
    assert not can_multiply(x[:, :100], weight[:, :100].contiguous())
    assert not can_multiply(x, weight.T)


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("rows", [1, 16])
def test_a_captured_graph_reads_other_rows(rows, pdl):
    from nanoflow_compiler.kernels.few_rows import multiply

    case = Product(rows, 520, 200)
    multiply(case.x, case.weight, pdl=pdl)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = multiply(case.x, case.weight, pdl=pdl)
    for _ in range(4):
        case.x.copy_(case.random(*case.x.shape))
        out.fill_(torch.nan)
        graph.replay()
        case.check(out, case.product())
