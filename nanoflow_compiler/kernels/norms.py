"""RMSNorm by our kernel where it takes the call."""

from torch import Tensor

from nanoflow_compiler.kernels.linears import can_chain, kernels_of

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, rounds_last: bool) -> Tensor | None:
    """The norm of ``x [T, columns]``; None where the kernel does not take the call."""
    kernels = kernels_of("norm")
    if kernels is None:
        return None
    norm = kernels.RmsNorm(weight, eps, rounds_last=rounds_last)
    if not kernels.can_norm(x, norm):
        return None
    normed: Tensor = kernels.rms_norm(x, norm, pdl=can_chain(x.device))[0]
    return normed
