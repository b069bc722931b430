"""Merged weights: several parameters as row ranges of one tensor, stored once."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["are_adjacent", "merge_rows"]


def merge_rows(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """The parameters' rows, ``[sum of rows, ...]``, as one contiguous tensor.

    The first call moves the parameters into one buffer and re-points their ``.data`` at its
    rows: nothing is stored twice, eager use and in-place updates still see the same memory, and
    later calls find them adjacent and cost only a view. Parameters that are not alone in their
    storage are copied instead, since something else may look at that storage.
    """
    if isinstance(parameters[0], FakeTensor):
        return torch.cat([*parameters])
    if are_adjacent(parameters):
        first = parameters[0].detach()
        rows = sum(parameter.shape[0] for parameter in parameters)
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    with torch.no_grad():
        merged = torch.cat([parameter.detach() for parameter in parameters])
    if all(map(_can_move, parameters)):
        pieces = merged.split([parameter.shape[0] for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.data = piece
    return merged


def are_adjacent(parameters: Sequence[torch.Tensor]) -> bool:
    """Whether the parameters follow each other in memory, as :func:`merge_rows` leaves them."""
    if not all(parameter.is_contiguous() for parameter in parameters):
        return False
    return all(
        before.untyped_storage().data_ptr() == after.untyped_storage().data_ptr()
        and before.data_ptr() + before.nbytes == after.data_ptr()
        for before, after in pairwise(parameters)
    )


def _can_move(parameter: torch.Tensor) -> bool:
    plain = type(parameter) in (torch.Tensor, torch.nn.Parameter)
    return plain and parameter.untyped_storage().nbytes() == parameter.nbytes
