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
    return _joined([take(source, dim, cuts, cells, at)], dim, rows=source.shape[dim])


def merge(pieces: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Pieces joined along ``dim``; in memory they lie as the first does, gaps included."""
    return _joined(pieces, dim, rows=pieces[0].shape[dim])


def _joined(pieces: Sequence[torch.Tensor], dim: int, *, rows: int) -> torch.Tensor:
    """``rows`` are those that the strides of the first piece span."""
    sizes, strides = pieces[0].shape, pieces[0].stride()
    order = sorted(range(len(strides)), key=lambda d: (-strides[d], d))
    inner = 1
    for d in reversed(order):
        if strides[d] != inner and sizes[d] != 1:
            return _joined_with_gaps(pieces, dim, rows=rows)
        inner *= rows if d == dim else sizes[d]
    return _joined_dense(pieces, dim, order)


def _joined_dense(pieces: Sequence[torch.Tensor], dim: int, order: list[int]) -> torch.Tensor:
    back = sorted(range(len(order)), key=order.__getitem__)
    joined = torch.cat([piece.permute(order) for piece in pieces], order.index(dim))
    return joined.permute(back)


def _joined_with_gaps(pieces: Sequence[torch.Tensor], dim: int, *, rows: int) -> torch.Tensor:
    """For views of a part of a tensor, and for expanded ones."""
    first = pieces[0]
    sizes, strides = list(first.shape), list(first.stride())
    sizes[dim] = sum(piece.shape[dim] for piece in pieces)
    if strides[dim] == 0:
        if all(piece.data_ptr() == first.data_ptr() for piece in pieces):
            return first.as_strided(sizes, strides)
        return _joined_dense(pieces, dim, list(range(first.ndim)))
    for d, stride in enumerate(strides):
        if d != dim and stride >= strides[dim] * rows:  # it spans all rows, so it grows with them
            strides[d] = stride // rows * sizes[dim]
    joined = torch.empty_strided(sizes, strides, dtype=first.dtype, device=first.device)
    repeated = [d for d, stride in enumerate(strides) if stride == 0]
    at = 0
    for piece in pieces:
        target = joined.narrow(dim, at, piece.shape[dim])
        _without(target, repeated).copy_(_without(piece, repeated))
        at += piece.shape[dim]
    return joined


def _without(tensor: torch.Tensor, repeated: Sequence[int]) -> torch.Tensor:
    """One of each entry that an expanded dimension shows many times."""
    for d in repeated:
        tensor = tensor.narrow(d, 0, 1)
    return tensor
