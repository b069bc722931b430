"""norms: an RMSNorm of a sum that a product made becomes one operator, bit for bit the same."""

import pytest
import torch

from nanoflow_compiler.passes.epilogue import epilogue
from nanoflow_compiler.passes.fuse import fuse
from nanoflow_compiler.passes.normalize import normalize
from nanoflow_compiler.passes.norms import norms
from nanoflow_compiler.stepper import Stepper
from traces import calls, trace


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


def fused(norm, *, dtype=torch.bfloat16, serves=lambda _: True, adds=True):
    """The trace of a linear, the addition of its input, and a norm of that."""

    def function(x, w0, w1):
        rows = (x.sin() @ w0.t()).reshape(1, -1, 8)
        hidden = x[None] + rows if adds else rows
        return norm(hidden, w1)[0] * 2, hidden * 3

    given = {"x": random(6, 8), "w0": random(8, 8, seed=1), "w1": random(8, seed=2)}
    given = {name: tensor.to(dtype) for name, tensor in given.items()}
    traced = trace(function, given, tokens={"x": 0}, weights=("w0", "w1"))
    step = Stepper()
    graph = step(fuse, step(normalize, traced.module), weights=traced.weights)
    before = traced.run()
    graph = step(epilogue, graph, weights=traced.weights, serves=lambda _: True)
    step(norms, graph, weights=traced.weights, serves=serves)
    for actual, expected in zip(traced.run(), before, strict=True):
        assert torch.equal(actual, expected)
    return traced


def scaled(x):
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)


def rounded_first(x, weight):
    return weight * scaled(x).to(x.dtype)


def rounded_last(x, weight):
    return (weight * scaled(x)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [rounded_first, rounded_last])
def test_before_and_after(norm, dtype):
    traced = fused(norm, dtype=dtype)
    found = calls(traced.module)
    assert found.count("rms_norm") == 1
    assert not {"rsqrt", "mean", "pow"} & set(found)
    (node,) = (n for n in traced.module.graph.nodes if "rms_norm" in str(n.target))
    assert node.args[2:] == (1e-6, norm is rounded_last and dtype is not torch.float32)
    (note,) = traced.module.meta["notes"]
    assert note.startswith("norm: rsqrt, ")


def one_more(x, weight):
    return (1.0 + weight.float()) * scaled(x)


def read_elsewhere(x, weight):
    root = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * (x.float() * root).to(x.dtype) + root.to(x.dtype)


def of_cubes(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(4).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def not_weighted(x, weight):
    return scaled(x).to(x.dtype) + weight


@pytest.mark.parametrize("norm", [one_more, read_elsewhere, of_cubes, not_weighted])
def test_others_stay(norm):
    traced = fused(norm)
    assert "rms_norm" not in calls(traced.module)
    assert traced.module.meta["notes"] == []


def test_norms_of_what_no_product_added_stay_in_their_clusters():
    assert "rms_norm" not in calls(fused(rounded_first, adds=False).module)


def test_what_no_kernel_serves_stays():
    assert "rms_norm" not in calls(fused(rounded_first, serves=lambda _: False).module)
