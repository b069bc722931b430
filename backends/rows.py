"""Cutting tensors into cells and joining them again, for whoever runs a program."""

from collections.abc import Sequence

import torch

__all__ = ["even_cuts", "merge", "take", "take_dense"]


def even_cuts(tokens: int, num_cells: int) -> tuple[int, ...]:
    """Token offsets that divide ``tokens`` into cells of like size."""
    return tuple(tokens * at // num_cells for at in range(num_cells + 1))


def take(
    source: torch.Tensor, dim: int, cuts: Sequence[int], cells: tuple[int, int], at: tuple[int, int]
) -> torch.Tensor:
    """The cells ``at`` of a tensor that holds ``cells``: a view; one token may be many rows."""
    base = cuts[cells[0]]
    multiple = source.shape[dim] // (cuts[cells[1]] - base)
    start, end = (cuts[at[0]] - base) * multiple, (cuts[at[1]] - base) * multiple
    return source.narrow(dim, start, end - start)


def take_dense(
    source: torch.Tensor, dim: int, cuts: Sequence[int], cells: tuple[int, int], at: tuple[int, int]
) -> torch.Tensor:
    """As :func:`take`, copied so that rows lie as in a tensor of just these cells."""
    return merge([take(source, dim, cuts, cells, at)], dim)


def merge(pieces: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Pieces joined along ``dim``, in memory in the order of dimensions of the first."""
    strides = pieces[0].stride()
    order = sorted(range(len(strides)), key=lambda d: (-strides[d], d))
    back = sorted(range(len(order)), key=order.__getitem__)
    joined = torch.cat([piece.permute(order) for piece in pieces], order.index(dim))
    return joined.permute(back)
