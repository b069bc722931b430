"""For each TOKEN rule of operations that move elements: random calls, to be placed or to be refused."""

from typing import Any

import torch
from hypothesis import strategies as st

from row_draw import Draw, case, rank
from rows_of_nodes import Case, Operand, Size

aten = torch.ops.aten


@case("reshape view _unsafe_view")
def _view(d: Draw, packet: Any) -> Case:
    """Other dimensions are folded or split; the tokens keep their place in memory, or not."""
    before, inner, after = d.sizes(d.number(0, 2)), d.number(1, 3), d.sizes(d.number(0, 2))
    multiple = d.multiple()
    x = d.rows([*before, 0, inner, *after], len(before), multiple)
    outer = torch.Size(before).numel()
    front = d.of([before, [outer], [*before, 1]]) if before else d.of([[], [1]])
    rest = torch.Size([inner, *after]).numel()
    kind = d.of(["keep", "fold", "split", "across"])
    if kind == "keep":
        return d.case(packet.default, x, [*front, Size(multiple), rest])
    if kind == "fold":
        return d.case(packet.default, x, [*front, Size(multiple * rest)])
    if kind == "split":
        return d.case(packet.default, x, [*front, Size(1), multiple, rest])
    if not before or outer == 1:
        return d.case(packet.default, x, [*front, -1, multiple * rest])
    return d.case(packet.default, x, [-1, rest], mixes=True)


@case("expand")
def _expand(d: Draw, packet: Any) -> Case:
    shape = [d.of([1, size]) for size in d.sizes(d.number(1, 3))]
    x = d.rows(shape, d.number(0, len(shape) - 1), d.multiple())
    target = [size if size != 1 else d.number(1, 4) for size in x.value.shape]
    sizes: list[Any] = [
        d.of([size, -1]) if size == old else size
        for size, old in zip(target, x.value.shape, strict=True)
    ]
    if sizes[x.dim] != -1:
        sizes[x.dim] = Size(x.multiple)
    return d.case(packet.default, x, [*d.sizes(d.number(0, 2)), *sizes])


@case("permute")
def _permute(d: Draw, packet: Any) -> Case:
    x = d.tensor()
    order = d.draw(st.permutations(range(rank(x))))
    return d.case(packet.default, x, [d.sign(dim, rank(x)) for dim in order])


@case("transpose")
def _transpose(d: Draw, packet: Any) -> Case:
    x = d.tensor()
    dims = [d.sign(d.number(0, rank(x) - 1), rank(x)) for _ in range(2)]
    return d.case(packet.int, x, *dims)


@case("t")
def _t(d: Draw, packet: Any) -> Case:
    return d.case(packet.default, d.tensor(high=2))


@case("unsqueeze")
def _unsqueeze(d: Draw, packet: Any) -> Case:
    x = d.tensor()
    return d.case(packet.default, x, d.sign(d.number(0, rank(x)), rank(x) + 1))


@case("squeeze")
def _squeeze(d: Draw, packet: Any) -> Case:
    """Asked to drop the dimension of the tokens, it would where a part has one token."""
    shape = [d.of([1, size]) for size in d.sizes(d.number(1, 4))]
    x = d.rows(shape, d.number(0, len(shape) - 1), d.multiple())
    others = [dim for dim in range(rank(x)) if dim != x.dim]
    if not others or d.number(0, 3) == 0:
        asked, kind = [x.dim], d.of(["default", "dim", "dims"])
    else:
        asked = d.draw(st.lists(st.sampled_from(others), min_size=1, unique=True))
        kind = "dims" if len(asked) > 1 else d.of(["dim", "dims"])
    signed = [d.sign(dim, rank(x)) for dim in asked]
    rest = {"default": (), "dim": (signed[0],), "dims": (signed,)}[kind]
    return d.case(getattr(packet, kind), x, *rest, mixes=asked == [x.dim])


@case("slice split split_with_sizes select unbind")
def _pieces(d: Draw, packet: Any) -> Case:
    x = d.tensor()
    dim = d.number(0, rank(x) - 1)
    size, mixes, signed = x.value.shape[dim], dim == x.dim, d.sign(dim, rank(x))
    if packet is aten.slice:
        start = d.number(0, size - 1)
        rest = (signed, start, d.number(start + 1, size), d.number(1, 2))
        if mixes and rest[1:] == (0, size, 1):
            rest = (signed, 0, size - 1, 1)
        return d.case(packet.Tensor, x, *rest, mixes=mixes)
    if packet is aten.split:
        return d.case(packet.Tensor, x, d.number(1, size), signed, mixes=mixes)
    if packet is aten.split_with_sizes:
        first = d.number(0, size)
        return d.case(packet.default, x, [first, size - first], signed, mixes=mixes)
    if packet is aten.select:
        index = d.number(-size, size - 1)
        return d.case(packet.int, x, signed, index, mixes=mixes)
    return d.case(packet.int, x, signed, mixes=mixes)


@case("flip roll")
def _turned(d: Draw, packet: Any) -> Case:
    x = d.tensor()
    dims = sorted(d.draw(st.sets(st.integers(0, rank(x) - 1), min_size=1)))
    signed = [d.sign(dim, rank(x)) for dim in dims]
    if packet is aten.flip:
        return d.case(packet.default, x, signed, mixes=x.dim in dims)
    if d.number(0, 4) == 0:
        return d.case(packet.default, x, [1], mixes=True)
    return d.case(packet.default, x, [1] * len(dims), signed, mixes=x.dim in dims)


@case("cat")
def _cat(d: Draw, packet: Any) -> Case:
    x = d.tensor()
    dim = d.number(0, rank(x) - 1)
    shape = list(x.value.shape)
    if dim != x.dim:
        shape[dim] = d.number(0 if x.multiple == 1 else 1, 3)
    other = Operand(d.floats(shape), x.dim, x.multiple, is_seed=d.chance())
    pieces = d.draw(st.permutations([x, other]))
    return d.case(packet.default, list(pieces), d.sign(dim, rank(x)), mixes=dim == x.dim)


@case("stack")
def _stack(d: Draw, packet: Any) -> Case:
    x = d.tensor()
    other = Operand(d.floats(x.value.shape), x.dim, x.multiple, is_seed=d.chance())
    at = d.sign(d.number(0, rank(x)), rank(x) + 1)
    return d.case(packet.default, [x, other], at)


@case("repeat")
def _repeat(d: Draw, packet: Any) -> Case:
    x = d.tensor(high=3)
    repeats = d.sizes(rank(x) + d.number(0, 1), high=3)
    at = x.dim + len(repeats) - rank(x)
    return d.case(packet.default, x, repeats, mixes=repeats[at] != 1)


@case("tril triu")
def _triangle(d: Draw, packet: Any) -> Case:
    x = d.tensor(low=2)
    return d.case(packet.default, x, d.number(-1, 1), mixes=x.dim >= rank(x) - 2)


@case("constant_pad_nd")
def _pad(d: Draw, packet: Any) -> Case:
    x = d.tensor()
    padded = d.number(1, rank(x))
    # One more before and one less behind: the size stays, the rows move.
    pairs = [d.of([(1, -1), (0, 1), (2, 0), (0, 0)]) for _ in range(padded)]
    sizes = [amount for pair in pairs for amount in pair]
    return d.case(packet.default, x, sizes, 0.5, mixes=x.dim >= rank(x) - padded)


def _index(d: Draw, shape: list[int], high: int, dim: int | None, multiple: int = 1) -> Operand:
    if dim is not None:
        shape[dim] = d.tokens * multiple
    return Operand(d.ints(shape, high), dim, multiple)


@case("embedding")
def _embedding(d: Draw, packet: Any) -> Case:
    entries, width = d.number(1, 5), d.number(1, 4)
    if d.number(0, 4) == 0:
        table = d.rows([0, width], 0)
        return d.case(packet.default, table, Operand(d.ints([3], d.tokens)), mixes=True)
    shape = d.sizes(d.number(1, 3))
    index = _index(d, shape, entries, d.number(0, len(shape) - 1), d.multiple())
    return d.case(packet.default, Operand(d.floats([entries, width])), index)


@case("index_select")
def _index_select(d: Draw, packet: Any) -> Case:
    if d.chance():
        shape = d.sizes(d.number(1, 3))
        at = d.number(0, len(shape) - 1)
        index = _index(d, [0], shape[at], 0, d.multiple())
        return d.case(packet.default, Operand(d.floats(shape)), d.sign(at, len(shape)), index)
    x = d.tensor()
    at = d.number(0, rank(x) - 1)
    index = Operand(d.ints([d.number(1, 4)], x.value.shape[at]))
    return d.case(packet.default, x, d.sign(at, rank(x)), index, mixes=at == x.dim)


@case("gather")
def _gather(d: Draw, packet: Any) -> Case:
    """Index and source each with rows or without; along the tokens only an index may have them."""
    x = d.tensor()
    at = d.number(0, rank(x) - 1)
    shape = list(x.value.shape)
    source = x
    kind = d.of(["both", "index", "source", "short"])
    if at == x.dim:
        limit = x.value.shape[at]
        index = Operand(d.ints(shape, limit), x.dim, x.multiple)
        if kind == "index":
            source = Operand(x.value)
        return d.case(packet.default, source, d.sign(at, rank(x)), index, mixes=kind != "index")
    shape[at] = d.number(1, 4)
    if kind == "short":  # an index of one row takes from the first row alone
        shape[x.dim] = 1
        index = Operand(d.ints(shape, x.value.shape[at]))
        return d.case(packet.default, x, d.sign(at, rank(x)), index, mixes=True)
    index = Operand(d.ints(shape, x.value.shape[at]), x.dim, x.multiple, is_seed=kind != "source")
    if kind == "index":
        source = Operand(x.value, x.dim, x.multiple, is_seed=False)
    return d.case(packet.default, source, d.sign(at, rank(x)), index)


@case("index")
def _indexing(d: Draw, packet: Any) -> Case:
    if d.chance():  # a table without tokens, indices with them
        shape = d.sizes(d.number(1, 3))
        start = d.number(0, len(shape) - 1)
        count = d.number(1, len(shape) - start)
        wide = d.sizes(d.number(1, 2))
        dim, multiple = d.number(0, len(wide) - 1), d.multiple()
        indices: list[Any] = [_index(d, list(wide), shape[start], dim, multiple)]
        beside = 1 if dim == len(wide) - 1 else wide[-1]  # broadcast with the first of them
        rest = shape[start + 1 : start + count]
        indices += [Operand(d.ints([d.of([1, beside])], size)) for size in rest]
        return d.case(packet.Tensor, Operand(d.floats(shape)), [None] * start + indices)
    x = d.tensor()
    start = d.number(0, rank(x) - 1)
    count = d.number(1, rank(x) - start)
    wide = d.sizes(d.number(0, 2))
    indices = [Operand(d.ints(wide, x.value.shape[start + i])) for i in range(count)]
    mixes = start <= x.dim < start + count
    return d.case(packet.Tensor, x, [None] * start + indices, mixes=mixes)


@case("index_put index_put_ _unsafe_index_put")
def _index_put(d: Draw, packet: Any) -> Case:
    x = d.tensor(low=2)
    start = d.number(0, rank(x) - 1)
    count = d.number(1, rank(x) - start)
    length = d.number(1, 3)
    indices = [Operand(d.ints([length], x.value.shape[start + i])) for i in range(count)]
    shape = [*x.value.shape[:start], length, *x.value.shape[start + count :]]
    mixes = start <= x.dim < start + count
    dim = x.dim if x.dim < start else x.dim - count + 1
    given = Operand(d.floats(shape), None if mixes else dim, x.multiple, is_seed=d.chance())
    if not mixes and d.chance():
        given = Operand(d.floats([]))
    # With accumulate: of two writes to one place without it, either may win.
    return d.case(packet.default, x, [None] * start + indices, given, True, mixes=mixes)


@case("index_copy index_copy_ index_add index_fill")
def _index_copy(d: Draw, packet: Any) -> Case:
    x = d.tensor()
    at = d.number(0, rank(x) - 1)
    size = x.value.shape[at]
    picked = torch.randperm(size, generator=d.generator)[: d.number(1, size)]
    signed, index, mixes = d.sign(at, rank(x)), Operand(picked), at == x.dim
    if packet is aten.index_fill:
        value, overload = d.of([(1.5, "int_Scalar"), (Operand(d.floats([])), "int_Tensor")])
        return d.case(getattr(packet, overload), x, signed, index, value, mixes=mixes)
    shape = list(x.value.shape)
    shape[at] = len(picked)
    source = Operand(d.floats(shape), None if mixes else x.dim, x.multiple, is_seed=d.chance())
    return d.case(packet.default, x, signed, index, source, mixes=mixes)


@case("scatter scatter_add")
def _scatter(d: Draw, packet: Any) -> Case:
    x = d.tensor(low=2)
    at = d.number(0, rank(x) - 1)
    shape = list(x.value.shape)
    mixes = at == x.dim
    kind = d.of(["all", "all", "short", "index"])
    if kind == "short" and not mixes:  # an index of one row writes to the first row alone
        shape[x.dim] = 1
        place, mixes = None, True
    else:
        place = None if mixes else x.dim
    shape[at] = d.number(1, x.value.shape[at])
    order = torch.rand([*shape[:at], x.value.shape[at], *shape[at + 1 :]], generator=d.generator)
    index = order.argsort(at).narrow(at, 0, shape[at]).contiguous()
    target = x
    has_rows = kind == "index" and place is not None
    if has_rows:
        target = Operand(x.value, x.dim, x.multiple, is_seed=False)
    indices = Operand(index, place, x.multiple, is_seed=has_rows or d.chance())
    source = Operand(d.floats(shape), place, x.multiple, is_seed=d.chance())
    signed = d.sign(at, rank(x))
    if packet is aten.scatter and d.chance():
        return d.case(packet.value, target, signed, indices, 1.5, mixes=mixes)
    overload = "src" if packet is aten.scatter else "default"
    return d.case(getattr(packet, overload), target, signed, indices, source, mixes=mixes)


@case("slice_scatter")
def _slice_scatter(d: Draw, packet: Any) -> Case:
    x = d.tensor(low=2)
    at = d.number(0, rank(x) - 1)
    shape = list(x.value.shape)
    start = d.number(0, shape[at] - 1)
    end = d.number(start + 1, shape[at])
    shape[at] = end - start
    mixes = at == x.dim
    source = Operand(d.floats(shape), None if mixes else x.dim, x.multiple, is_seed=d.chance())
    return d.case(packet.default, x, source, d.sign(at, rank(x)), start, end, mixes=mixes)
