"""RMSNorm on a GPU against what a model computes, with memory around it that would show."""

import pytest
import torch

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROUNDINGS = [(False, False), (False, True), (True, True)]


def random(*shape, dtype):
    return torch.randn(*shape, device="cuda").to(dtype)


def expected(x, norm):
    """As Llama and Gemma have it in eager PyTorch."""
    hidden = x.float()
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.eps)
    if norm.rounds_last:
        weight = norm.weight.float()
        return (hidden * (1 + weight if norm.adds_one else weight)).to(x.dtype)
    return norm.weight * hidden.to(x.dtype)


def check(found, wanted):
    """Sums in another order move few roundings, each by one bit."""
    if found.dtype is torch.float32:
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=1e-6)
    else:
        assert (found != wanted).float().mean() < 0.02
        torch.testing.assert_close(found, wanted, rtol=1.6e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("adds_one", "rounds_last"), ROUNDINGS)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 4096), (3, 100), (300, 2880), (5, 16384), (2, 1)]
)
@pytest.mark.parametrize("has_residual", [False, True])
def test_rows(rows, columns, has_residual, adds_one, rounds_last, dtype):
    from nanoflow_compiler.kernels.norm import RmsNorm, can_norm, rms_norm

    norm = RmsNorm(random(columns, dtype=dtype), 1e-5, adds_one, rounds_last)
    x = random(rows, columns + 5, dtype=dtype)[:, :columns]
    residual = random(rows, columns + 3, dtype=dtype)[:, :columns] if has_residual else None
    assert can_norm(x, norm)
    around = x.new_full((rows + 2, columns + 8), torch.nan)
    out = around[1:-1, :-8]
    found, total = rms_norm(x, norm, residual=residual, out=out, pdl=True)
    assert found is out
    wanted = residual + x if has_residual else x
    assert torch.equal(total, wanted)
    check(found, expected(wanted, norm))
    out.fill_(torch.nan)
    assert around.isnan().all()


def test_rows_of_zeros_and_large_rows():
    from nanoflow_compiler.kernels.norm import RmsNorm, rms_norm

    norm = RmsNorm(random(512, dtype=torch.bfloat16), 1e-6)
    x = torch.zeros(2, 512, device="cuda", dtype=torch.bfloat16)
    x[1] = 1e15
    found, _ = rms_norm(x, norm)
    assert not found[0].any()
    check(found[1], norm.weight)


def test_what_is_not_computed():
    from nanoflow_compiler.kernels.norm import RmsNorm, can_norm

    x = random(2, 512, dtype=torch.bfloat16)
    weight = random(512, dtype=torch.bfloat16)
    assert can_norm(x, RmsNorm(weight, 1e-5))
    assert not can_norm(x, RmsNorm(weight.float(), 1e-5))
    assert not can_norm(x, RmsNorm(weight[:256], 1e-5))
    assert not can_norm(x[None], RmsNorm(weight, 1e-5))
    assert not can_norm(x[:, ::2], RmsNorm(weight[:256], 1e-5))
    wide = random(1, 16385, dtype=torch.bfloat16)
    assert not can_norm(wide, RmsNorm(wide[0].clone(), 1e-5))
