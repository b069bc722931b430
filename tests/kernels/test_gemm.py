"""GEMMs and what is fused to them, against float64 and against the separate operations."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from nanoflow_compiler.experts import ACTIVATIONS

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16)
SIZES = (
    (1, 8, 8),
    (1, 4096, 4096),
    (7, 24, 200),
    (64, 128, 64),
    (100, 1000, 264),
    (129, 264, 1032),
    (333, 4096, 72),
    (1000, 1032, 520),
    (2048, 2048, 2048),
)
"""M, N and K."""


def tilings():
    from nanoflow_compiler.kernels.gemm import GemmTiling

    return {
        "default": GemmTiling(),
        "in groups of 3": GemmTiling(group=3, num_stages=3, store_columns=64),
        "whole at once": GemmTiling(num_stages=3, store_columns=256),
        "nested": GemmTiling(flatten=False),
        "one for each": GemmTiling(flatten=False, persistent=False),
        "deep": GemmTiling(depth=128, num_stages=2),
        "tall": GemmTiling(rows=256, columns=128, store_columns=64),
        "flat": GemmTiling(rows=64, num_warps=4, store_columns=64),
        "two of each": GemmTiling(
            columns=128, num_stages=3, num_warps=4, store_columns=64, ctas_per_sm=2
        ),
        "small": GemmTiling(rows=16, columns=64, num_warps=4, store_columns=32),
    }


NAMES = (
    "default",
    "in groups of 3",
    "whole at once",
    "nested",
    "one for each",
    "deep",
    "tall",
    "flat",
    "two of each",
    "small",
)
CASES = [*((name, torch.bfloat16) for name in NAMES), ("default", torch.float16)]
"""Each has its own kernel to compile."""


class Layer:
    """Random tokens, whose rows have others between them, and a linear layer."""

    def __init__(self, rows, columns, depth, *, dtype=torch.bfloat16, halves=1):
        generator = torch.Generator("cuda").manual_seed(rows + columns + depth)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

        self.x = draw(rows, depth + 40)[:, :depth]
        self.weight = (draw(halves * columns, depth) / depth**0.5).t()
        self.bias = draw(columns)
        self.residual = draw(rows, columns + 24)[:, :columns]
        # Rows and columns around a result show what is written beyond it.
        self.canvas = draw(rows + 2, columns + 16).fill_(torch.nan)
        self.out = self.canvas[1:-1, 8:-8]

    def product(self):
        return self.x.double() @ self.weight.double()

    def check_canvas(self):
        """What lies around the result is untouched."""
        assert self.out.isfinite().all()
        self.out.fill_(torch.nan)
        assert self.canvas.isnan().all()


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-9))


def assert_as_good(found, eager, expected):
    """No further from float64 than separate operations are, which round at the same places."""
    assert found.dtype is eager.dtype
    assert found.shape == eager.shape
    eps = torch.finfo(found.dtype).eps
    assert relative(found, expected) < 1.05 * relative(eager, expected) + 0.05 * eps


def poison():
    """Fill memory that is free, of the sizes that results will have, with NaN."""
    for num_bytes in (1 << 9, 1 << 14, 1 << 18, 1 << 21, 1 << 24):
        kept = [torch.full((num_bytes // 4,), torch.nan, device="cuda") for _ in range(4)]
        del kept


def test_names():
    assert tuple(tilings()) == NAMES


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_products(name, dtype):
    from nanoflow_compiler.kernels.gemm import can_run, multiply

    tiling = tilings()[name]
    for sizes in SIZES:
        layer = Layer(*sizes, dtype=dtype)
        assert can_run(layer.x, layer.weight)
        poison()
        found = multiply(layer.x, layer.weight, tiling=tiling)
        assert_as_good(found, layer.x @ layer.weight, layer.product())
        multiply(layer.x, layer.weight, tiling=tiling, out=layer.out)
        assert torch.equal(layer.out, found)
        layer.check_canvas()


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_bias_is_added_before_rounding(name, dtype):
    from nanoflow_compiler.kernels.gemm import multiply

    for sizes in SIZES:
        layer = Layer(*sizes, dtype=dtype)
        found = multiply(layer.x, layer.weight, bias=layer.bias, tiling=tilings()[name])
        eager = torch.addmm(layer.bias, layer.x, layer.weight)
        assert_as_good(found, eager, layer.product() + layer.bias.double())


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_residual_is_added_after_rounding(name, in_place, dtype):
    from nanoflow_compiler.kernels.gemm import SHARED_BYTES, multiply

    tiling = tilings()[name]
    if tiling.shared_bytes(reads_residual=not in_place) > SHARED_BYTES:
        pytest.skip("does not fit")
    for sizes in SIZES:
        layer = Layer(*sizes, dtype=dtype)
        if in_place:
            layer.out.copy_(layer.residual)
        residual = layer.out if in_place else layer.residual
        multiply(layer.x, layer.weight, residual=residual, out=layer.out, tiling=tiling)
        eager = layer.x @ layer.weight + layer.residual
        assert_as_good(layer.out, eager, layer.product() + layer.residual.double())
        # The very bits, where the product is the same: it is rounded before the residual is added.
        product = multiply(layer.x, layer.weight, tiling=tiling)
        assert torch.equal(layer.out, product + layer.residual)
        layer.check_canvas()


@pytest.mark.parametrize(
    ("name", "dtype", "layout"),
    [(name, dtype, "stacked") for name, dtype in CASES]
    + [
        (name, torch.bfloat16, layout)
        for name in ("default", "tall", "small")
        for layout in ("pairs", "interleaved 8", "interleaved 16")
    ],
)
def test_gates(name, dtype, layout):
    from nanoflow_compiler.kernels.gemm import interleave, multiply_gated

    tiling = replace(tilings()[name], pairs=layout == "pairs")
    block = int(layout.split()[1]) if layout.startswith("interleaved") else None
    for rows, columns, depth in SIZES:
        if block and columns % block:
            continue
        layer = Layer(rows, columns, depth, dtype=dtype, halves=2)
        weight = interleave(layer.weight, block) if block else layer.weight
        multiply_gated(
            layer.x, weight, activation="silu", block=block, out=layer.out, tiling=tiling
        )
        check_gate(layer.out, layer, activation="silu")
        layer.check_canvas()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(activation, dtype):
    from nanoflow_compiler.kernels.gemm import can_gate, multiply_gated

    for sizes in SIZES:
        layer = Layer(*sizes, dtype=dtype, halves=2)
        assert can_gate(layer.x, layer.weight, activation=activation)
        poison()
        found = multiply_gated(layer.x, layer.weight, activation=activation)
        check_gate(found, layer, activation=activation)


def check_gate(found, layer, *, activation):
    def gated(product):
        gate, up = product.chunk(2, dim=1)
        return ACTIVATIONS[activation](gate) * up

    assert_as_good(found, gated(layer.x @ layer.weight), gated(layer.product()))


def test_random_sizes():
    from nanoflow_compiler.kernels.gemm import multiply, multiply_gated

    draw = random.Random(0)
    for _ in range(40):
        rows, columns, depth = draw.randint(1, 700), *(8 * draw.randint(1, 90) for _ in "NK")
        tiling = draw.choice(list(tilings().values()))
        num_sms = draw.choice([None, 1, 7, 100])
        layer = Layer(rows, columns, depth)
        found = multiply(layer.x, layer.weight, tiling=tiling, num_sms=num_sms)
        assert_as_good(found, layer.x @ layer.weight, layer.product())
        layer = Layer(rows, columns, depth, halves=2)
        found = multiply_gated(
            layer.x, layer.weight, activation="silu", tiling=tiling, num_sms=num_sms
        )
        check_gate(found, layer, activation="silu")


def test_a_row_does_not_depend_on_the_others():
    from nanoflow_compiler.kernels.gemm import multiply

    layer = Layer(700, 512, 1024)
    before = multiply(layer.x, layer.weight)
    layer.x[1:] = torch.nan
    assert torch.equal(multiply(layer.x, layer.weight)[0], before[0])
    assert torch.equal(multiply(layer.x[:1], layer.weight)[0], before[0])


def test_what_is_no_number_stays_so():
    from nanoflow_compiler.kernels.gemm import multiply_gated

    layer = Layer(300, 512, 256, halves=2)
    layer.x[17, 3] = torch.nan
    found = multiply_gated(layer.x, layer.weight, activation="silu")
    assert found[17].isnan().all()
    assert found.isnan().sum() == found.shape[1]


def test_a_result_of_more_than_int32_counts():
    from nanoflow_compiler.kernels.gemm import multiply

    layer = Layer(70_000, 32_000, 64)
    found = multiply(layer.x, layer.weight)
    for rows in (slice(0, 5), slice(67_100, 67_120), slice(-5, None)):
        expected = layer.x[rows].double() @ layer.weight.double()
        assert relative(found[rows], expected) < 4e-3


def test_a_captured_graph_serves_other_tokens():
    from nanoflow_compiler.kernels.gemm import multiply, multiply_gated

    layer = Layer(500, 768, 512)
    gate = Layer(500, 768, 512, halves=2)

    def step():
        multiply(layer.x, layer.weight, residual=layer.residual, out=layer.residual)
        return multiply_gated(layer.x, gate.weight, activation="silu")

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(3):
        layer.x.copy_(torch.randn_like(layer.x))
        gate.x = layer.x
        before = layer.residual.clone()
        out.fill_(torch.nan)
        graph.replay()
        check_gate(out, gate, activation="silu")
        assert torch.equal(layer.residual, before + multiply(layer.x, layer.weight))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_it_does_not_wait_for_the_gpu():
    from nanoflow_compiler.kernels.gemm import multiply

    layer = Layer(500, 768, 512)
    multiply(layer.x, layer.weight)
    torch.cuda.set_sync_debug_mode("error")
    try:
        multiply(layer.x, layer.weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_refused():
    from nanoflow_compiler.kernels.gemm import can_gate, can_run

    layer = Layer(32, 64, 48)
    x, weight = layer.x, layer.weight
    assert can_run(x, weight, bias=layer.bias, residual=layer.residual)
    assert not can_run(x.float(), weight.float())
    assert not can_run(x, weight.half())
    assert not can_run(x, weight, bias=layer.bias.half())
    assert not can_run(x.t().contiguous().t(), weight)
    assert not can_run(x, weight.contiguous())
    assert not can_run(x[:0], weight)
    assert not can_run(x, weight[:, :60])
    assert not can_run(x[:, 1:], weight[1:])
    assert not can_run(torch.empty(32, 49, device="cuda", dtype=x.dtype)[:, :48], weight)
    assert not can_run(x, weight, residual=layer.residual.t().contiguous().t())
    assert not can_run(x, weight, bias=torch.stack([layer.bias] * 2, dim=1)[:, 0])
    assert not can_run(x[:1].expand(32, 48), weight)
    assert not can_run(x.cpu(), weight.cpu())
    assert can_gate(x, weight, activation="silu")
    assert not can_gate(x, weight[:, :24], activation="silu")
    assert not can_gate(x, weight, activation="clamped_swiglu")
    assert not can_gate(x, weight, activation="softsign")


def test_shared_memory_is_what_is_said():
    """Every tiling that should fit does, and runs."""
    from nanoflow_compiler.kernels.gemm import SHARED_BYTES, GemmTiling, multiply

    layer = Layer(300, 512, 512)
    for rows, columns, stages, stored in itertools.product(
        (64, 128), (128, 256), (3, 4, 5), (64, 128, 256)
    ):
        tiling = GemmTiling(
            rows, columns, num_stages=stages, num_warps=rows // 16, store_columns=stored
        )
        if tiling.shared_bytes() <= SHARED_BYTES:
            multiply(layer.x, layer.weight, tiling=tiling)
