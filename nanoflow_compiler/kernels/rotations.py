"""Rotary embedding with the append, by our kernel where it takes the call."""

from torch import Tensor

from nanoflow_compiler.kernels.pdl import may_chain
from nanoflow_compiler.kernels.rotary_append import Rotary, can_rotate, rotate_and_append
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
    rotary = Rotary(*angles)
    if not can_rotate(query, key, value, rotary=rotary):
        return None
    pdl = may_chain(query.device)
    return rotate_and_append(query, key, value, rotary=rotary, pages=pages, slots=slots, pdl=pdl)
