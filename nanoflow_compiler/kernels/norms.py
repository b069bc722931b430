"""RMSNorm by our kernel where it takes the call."""

from torch import Tensor

from nanoflow_compiler.kernels import norm as kernels
from nanoflow_compiler.kernels.pdl import may_chain

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, rounds_last: bool) -> Tensor | None:
    """The norm of ``x [T, columns]``; None where the kernel does not take the call."""
    norm = kernels.RmsNorm(weight, eps, rounds_last=rounds_last)
    if not kernels.can_norm(x, norm):
        return None
    return kernels.rms_norm(x, norm, pdl=may_chain(x.device))[0]
