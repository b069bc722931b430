"""Mixtures of experts on a GPU against float64, with memory around them that would show."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nanoflow_compiler import ops
from nanoflow_compiler.experts import ACTIVATIONS, ExpertWeights, run_experts

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Mixture:
    """Random experts, and tokens whose rows have others between them."""

    def __init__(
        self,
        *,
        tokens=50,
        experts=8,
        top_k=2,
        hidden=128,
        inner=96,
        activation="silu",
        gated=True,
        transposed=False,
        has_bias=False,
        dtype=torch.bfloat16,
    ):
        self.generator = torch.Generator("cuda").manual_seed(tokens + experts)
        outer = 2 * inner if gated else inner

        def random(*shape):
            return torch.randn(*shape, generator=self.generator, device="cuda").to(dtype)

        self.random = random
        self.hidden = random(tokens, hidden + 40)[:, :hidden]
        scores = random(tokens, experts).float()
        self.index = scores.topk(top_k).indices
        self.scores = random(tokens, top_k).softmax(-1)
        up = random(experts, outer, hidden) / hidden**0.5
        down = random(experts, hidden, inner) / inner**0.5
        if transposed:
            up, down = up.mT.contiguous(), down.mT.contiguous()
        biases = (random(experts, outer), random(experts, hidden)) if has_bias else (None, None)
        self.weights = ExpertWeights(up, down, *biases, activation, gated, transposed)

    def run(self, *, tiling=None):
        from nanoflow_compiler.kernels import experts

        poison()
        return experts.run_experts(
            self.hidden,
            top_k_index=self.index,
            top_k_weights=self.scores,
            weights=self.weights,
            tiling=tiling,
        )

    def expected(self):
        """In float64; each expert sees the tokens that chose it."""
        own = self.weights
        up, down, up_bias, down_bias = (
            None if tensor is None else tensor.double()
            for tensor in (own.up, own.down, own.up_bias, own.down_bias)
        )
        weights = replace(own, up=up, down=down, up_bias=up_bias, down_bias=down_bias)
        out = torch.zeros(self.hidden.shape, dtype=torch.float64, device="cuda")
        for expert in range(len(up)):
            tokens, slots = (self.index == expert).nonzero(as_tuple=True)
            if len(tokens):
                results = weights(self.hidden[tokens].double(), expert=expert)
                scores = self.scores[tokens, slots].double()
                out.index_add_(0, tokens, results * scores[:, None])
        return out

    def check(self, found=None):
        found = self.run() if found is None else found
        expected = self.expected()
        assert found.dtype is self.hidden.dtype
        assert found.shape == expected.shape
        error = (found.double() - expected).norm() / expected.norm().clamp(min=1e-9)
        assert float(error) < TOLERANCE[found.dtype]


def poison():
    """Fill memory that is free, of the sizes that kernels will ask for, with NaN."""
    for num_bytes in (1 << 9, 1 << 14, 1 << 18, 1 << 21, 1 << 24, 1 << 26):
        kept = [torch.full((num_bytes // 4,), torch.nan, device="cuda") for _ in range(4)]
        del kept


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 100, 333, 1500])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 2), (8, 2), (60, 4), (128, 8)])
def test_numbers_of_tokens_and_experts(tokens, experts, top_k, dtype):
    Mixture(tokens=tokens, experts=experts, top_k=top_k, dtype=dtype).check()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("activation", "gated"),
    [(name, gated) for name in ACTIVATIONS for gated in (False, True)] + [("clamped_swiglu", True)],
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_activations_and_layouts(activation, gated, transposed, has_bias, dtype):
    given = {"activation": activation, "gated": gated, "dtype": dtype}
    for tokens in (5, 70, 1000):
        Mixture(tokens=tokens, transposed=transposed, has_bias=has_bias, **given).check()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("hidden", "inner"), [(8, 8), (32, 24), (33, 31), (200, 7), (136, 1000), (2048, 768)]
)
def test_sizes(hidden, inner, transposed, dtype):
    """With and without what TMA can read."""
    for tokens, name in ((3, "silu"), (90, "clamped_swiglu"), (700, "silu")):
        sizes = {"hidden": hidden, "inner": inner, "activation": name}
        Mixture(tokens=tokens, transposed=transposed, has_bias=True, dtype=dtype, **sizes).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["silu", "clamped_swiglu"])
def test_every_tiling(activation, dtype):
    from nanoflow_compiler.kernels.grouped_gemm import TILINGS

    for tokens in (1, 40, 600):
        mixture = Mixture(tokens=tokens, activation=activation, has_bias=True, dtype=dtype)
        for tiling in TILINGS:
            mixture.check(mixture.run(tiling=tiling))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_large_mixture(dtype):
    Mixture(tokens=700, hidden=2048, inner=3000, dtype=dtype).check()


@pytest.mark.parametrize("seed", range(16))
def test_random_shapes(seed):
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(1, 140))
    Mixture(
        tokens=int(rng.choice([1, 2, 16, 17, *rng.integers(1, 2000, 4)])),
        experts=experts,
        top_k=int(rng.integers(1, min(experts, 10) + 1)),
        hidden=8 * int(rng.integers(1, 90)),
        inner=int(rng.integers(1, 700)),
        activation=str(rng.choice(["silu", "clamped_swiglu"])),
        transposed=bool(rng.integers(2)),
        has_bias=bool(rng.integers(2)),
        dtype=[*TOLERANCE][rng.integers(3)],
    ).check()


@pytest.mark.parametrize("tokens", [1, 30, 2000])
def test_all_tokens_go_to_one_expert(tokens):
    mixture = Mixture(tokens=tokens, experts=32, top_k=2)
    for expert in (0, 17, 31):
        mixture.index.fill_(expert)
        mixture.check()


@pytest.mark.parametrize("tokens", [1, 30, 2000])
def test_what_is_no_expert_adds_nothing(tokens):
    mixture = Mixture(tokens=tokens, experts=8, top_k=4)
    mixture.index[:, ::2] += torch.arange(tokens, device="cuda")[:, None] % 12
    mixture.scores[mixture.index >= 8] = torch.nan
    mixture.check()
    mixture.index.fill_(8)
    assert not mixture.run().any()


def test_no_tokens():
    mixture = Mixture(tokens=5)
    mixture.hidden, mixture.index = mixture.hidden[:0], mixture.index[:0]
    assert mixture.run().shape == mixture.hidden.shape


def test_indices_and_weights_of_other_kinds():
    mixture = Mixture(tokens=90)
    mixture.index = mixture.index.int().T.contiguous().T
    mixture.scores = mixture.scores.float()
    mixture.check()


@pytest.mark.parametrize("tokens", [3, 200, 3000])
def test_a_token_does_not_depend_on_the_others(tokens):
    mixture = Mixture(tokens=tokens)
    before = mixture.run()
    assert torch.equal(mixture.run(), before)
    mixture.hidden[1:] = torch.nan
    mixture.index[1:] = mixture.index[1:].flip(0)
    assert torch.equal(mixture.run()[0], before[0])


def test_an_activation_that_kernels_do_not_know(monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "softsign", torch.nn.functional.softsign)
    for gated in (False, True):
        Mixture(activation="softsign", gated=gated, has_bias=True).check()


def test_weights_with_gaps():
    """Views of what is stored otherwise: neither dimension of a matrix may be dense."""
    mixture = Mixture(has_bias=True)
    own = mixture.weights
    up = torch.empty(*own.up.shape, 2, device="cuda", dtype=own.up.dtype)[..., 0].copy_(own.up)
    down = own.down.mT.contiguous().mT
    biases = [
        torch.empty(8, 500, device="cuda", dtype=bias.dtype)[:, : bias.shape[1]].copy_(bias)
        for bias in (own.up_bias, own.down_bias)
    ]
    mixture.weights = replace(own, up=up, down=down, up_bias=biases[0], down_bias=biases[1])
    mixture.check()


@pytest.mark.parametrize("tokens", [1, 64, 1000])
def test_a_captured_graph_serves_other_routings(tokens):
    mixture = Mixture(tokens=tokens, experts=16, top_k=4)
    given = {"top_k_index": mixture.index, "top_k_weights": mixture.scores}
    run_experts(mixture.hidden, weights=mixture.weights, **given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run_experts(mixture.hidden, weights=mixture.weights, **given)
    for turn in range(4):
        mixture.hidden.copy_(mixture.random(*mixture.hidden.shape))
        index = mixture.random(tokens, 20).float().topk(4).indices
        mixture.index.copy_(index if turn else torch.zeros_like(index))
        out.fill_(torch.nan)
        graph.replay()
        mixture.check(out)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_operator_does_not_wait_for_the_gpu():
    mixture = Mixture(has_bias=True)
    own = mixture.weights
    given = (own.up, own.down, own.up_bias, own.down_bias, own.activation, own.gated, False)
    ops.moe_experts(mixture.hidden, mixture.index, mixture.scores, *given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = ops.moe_experts(mixture.hidden, mixture.index, mixture.scores, *given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    mixture.check(found)
