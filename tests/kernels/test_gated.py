"""The gate of an MLP on a GPU against eager PyTorch."""

import pytest
import torch

from nanoflow_compiler.experts import ACTIVATIONS

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 14336), (3, 33), (700, 2050)])
def test_rows(rows, columns, pdl, activation, dtype):
    from nanoflow_compiler.kernels.gated import can_gate, gate_rows

    gate_up = 4 * torch.randn(rows, 2 * columns + 7, device="cuda").to(dtype)
    gate_up = gate_up[:, : 2 * columns]
    assert can_gate(gate_up, activation=activation)
    around = gate_up.new_full((rows + 2, columns + 8), torch.nan)
    out = around[1:-1, :-8]
    assert gate_rows(gate_up, activation=activation, out=out, pdl=pdl) is out
    gate, up = gate_up.chunk(2, dim=-1)
    wanted = ACTIVATIONS[activation](gate) * up
    tolerance = 1e-5 if dtype is torch.float32 else 1.6e-2
    torch.testing.assert_close(out, wanted, rtol=tolerance, atol=1e-5)
    if dtype is not torch.float32:
        # Further below zero, eager computes one less almost one.
        is_accurate = gate > -2
        assert (out != wanted)[is_accurate].float().mean() < 0.02
    out.fill_(torch.nan)
    assert around.isnan().all()


def test_what_is_not_computed():
    from nanoflow_compiler.kernels.gated import can_gate

    gate_up = torch.randn(2, 64, device="cuda")
    assert not can_gate(gate_up, activation="relu")
    assert not can_gate(gate_up[:, :63], activation="silu")
    assert not can_gate(gate_up.T, activation="silu")
    assert not can_gate(gate_up[None], activation="silu")
