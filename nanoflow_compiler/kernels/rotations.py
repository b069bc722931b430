"""Rotary embedding with the append, by our kernel where it takes the call."""

from torch import Tensor

from nanoflow_compiler.kernels.linears import can_chain, kernels_of
from nanoflow_compiler.kv_cache import HeadPages

__all__ = ["rotary_append"]


def rotary_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    angles: tuple[Tensor, Tensor],
    pages: HeadPages,
    slots: Tensor,
) -> Tensor | None:
    """The rotated queries; None, and nothing is stored, where the kernel does not take the call.

    ``angles`` are cosines and sines ``[T, width]``.
    """
    kernels = kernels_of("rotary_append")
    if kernels is None:
        return None
    rotary = kernels.Rotary(*angles)
    if not kernels.can_rotate(query, key, value, rotary=rotary):
        return None
    pdl = can_chain(query.device)
    rotated: Tensor = kernels.rotate_and_append(
        query, key, value, rotary=rotary, pages=pages, slots=slots, pdl=pdl
    )
    return rotated
