"""The TOKEN rules of ``axis``: one per kind of operation, each a proof of row independence.

A rule gets the operands of a node, of which some carry rows (``Rows``: the dimension, and how
many adjacent entries of it belong to one token), and returns where the rows are in the output
and how each operand is read; or it raises :class:`Refusal` with the reason. An operand without
rows is either read whole or, where its size there is that of the rows, cut along with them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from nanoflow_compiler.graphs import shape_of, size_expr
from nanoflow_compiler.rows import Placed, Rows

__all__ = ["RULES", "Operands", "Placement", "Refusal", "Rule"]


@dataclass(frozen=True, slots=True)
class Placement:
    """A rule's answer; ``size_arg`` is the argument that holds output sizes, if there is one."""

    rows: Placed
    reads: dict[str, Rows | None]
    size_arg: int | None = None


class Refusal(Exception):  # noqa: N818 - an answer of a rule, never an error of the caller
    """The node may mix tokens; the message says how."""


class Operands:
    """The operands of one node, and how the rule decides to read them."""

    def __init__(self, node: fx.Node, tokens: sympy.Expr) -> None:
        self.node = node
        self.tokens = tokens
        self.reads: dict[str, Rows | None] = {}

    def arg(self, index: int, name: str = "", default: Any = None) -> Any:
        """Argument by position or keyword."""
        if index < len(self.node.args):
            return self.node.args[index]
        return self.node.kwargs.get(name, default)

    def named(self, name: str, default: Any = None) -> Any:
        """Argument by its name in the operator's schema."""
        if name in self.node.kwargs:
            return self.node.kwargs[name]
        names = [arg.name for arg in self.node.target._schema.arguments]  # type: ignore[union-attr]
        return self.arg(names.index(name), name, default) if name in names else default

    def rows(self, operand: object) -> Rows | None:
        """The rows of an operand, if it carries any."""
        if not isinstance(operand, fx.Node):
            return None
        rows: Placed = operand.meta["axis"].rows
        if isinstance(rows, tuple):
            raise Refusal("reads a tuple")
        return rows

    def read(self, operand: object, rows: Rows | None) -> None:
        """Read ``operand`` at ``rows``, or whole when None; one operand, one way."""
        if not isinstance(operand, fx.Node):
            return
        if operand.name in self.reads and self.reads[operand.name] != rows:
            raise Refusal(f"{operand.name} is needed both whole and in parts")
        self.reads[operand.name] = rows

    def whole(self, *operands: object) -> None:
        """Read operands whole; one with rows would mix tokens."""
        for operand in operands:
            if self.rows(operand) is not None:
                raise Refusal("an operand that every row needs depends on tokens")
            self.read(operand, None)

    def align(self, operand: object, rows: Rows) -> None:
        """Read an operand of the output's own shape at ``rows``, or whole if it broadcasts there."""
        if not isinstance(operand, fx.Node):
            return
        shape = shape_of(operand)
        has = self.rows(operand)
        if has is not None and has != rows:
            raise Refusal(f"tokens meet on different axes, {has} and {rows}")
        if rows.dim < 0 or shape[rows.dim] == 1:
            self.whole(operand)
        elif shape[rows.dim] == sympy.expand(rows.multiple * self.tokens):
            self.read(operand, rows)
        else:
            raise Refusal(f"{operand.name} does not line up with the tokens")

    def align_exactly(self, operand: object, rows: Rows) -> None:
        """As ``align``, where the operation does not broadcast: one row is then the first row."""
        if isinstance(operand, fx.Node) and shape_of(operand)[rows.dim] == 1:
            raise Refusal(f"{operand.name} has one row for all tokens")
        self.align(operand, rows)

    def placed(self, rows: Placed, *, size_arg: int | None = None) -> Placement:
        """The answer, with what was read; what no one asked about is read whole."""
        for operand in self.node.all_input_nodes:
            if operand.name not in self.reads:
                self.whole(operand)
        return Placement(rows, dict(self.reads), size_arg)


Rule = Callable[[Operands], Placement]
RULES: dict[object, Rule] = {}
aten = torch.ops.aten


def rule(*targets: object) -> Callable[[Rule], Rule]:
    """Register a rule for operator packets."""

    def register(function: Rule) -> Rule:
        for target in targets:
            RULES[target] = function
        return function

    return register


def packets(names: str) -> list[object]:
    """The ATen packets of these names that the installed torch has."""
    return [getattr(aten, name) for name in names.split() if hasattr(aten, name)]


def first_rows(ops: Operands, index: int = 0) -> Rows:
    """The rows of an operand that must carry them."""
    rows = ops.rows(ops.arg(index))
    if rows is None:
        raise Refusal("tokens come in through an operand that is shared")
    return rows


def positive(dim: int, rank: int) -> int:
    """``dim`` counted from the front."""
    return dim + rank if dim < 0 else dim


def rank_of(operand: fx.Node) -> int:
    """The number of dimensions."""
    return len(shape_of(operand))


def broadcast(ops: Operands, operands: Sequence[object], rank: int) -> Rows:
    """Read operands as broadcasting to ``rank`` dimensions does; the rows of the result."""
    nodes = [operand for operand in operands if isinstance(operand, fx.Node)]
    nodes = [node for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    found = {
        Rows(rows.dim + rank - rank_of(node), rows.multiple)
        for node in nodes
        if (rows := ops.rows(node)) is not None
    }
    if len(found) != 1:
        raise Refusal(
            f"tokens meet on different axes: {', '.join(map(str, sorted(found, key=str)))}"
        )
    rows = found.pop()
    for node in nodes:
        ops.align(node, Rows(rows.dim - (rank - rank_of(node)), rows.multiple))
    return rows


def output_rank(ops: Operands) -> int:
    """Dimensions of the node's own tensor."""
    return len(ops.node.meta["val"].shape)


def same_rows(ops: Operands, dims: Sequence[int]) -> Placement:
    """Rows stay where they are in an operation along ``dims``, of which none may be theirs."""
    rows = first_rows(ops)
    rank = rank_of(ops.arg(0))
    if not dims or rows.dim in {positive(dim, rank) for dim in dims}:
        raise Refusal("works along the tokens")
    ops.read(ops.arg(0), rows)
    value = ops.node.meta["val"]
    count = len(value) if isinstance(value, list | tuple) else 0
    return ops.placed(tuple([rows] * count) if count else rows)


def extent(shape: Sequence[sympy.Expr]) -> sympy.Expr:
    """The product of sizes."""
    return sympy.expand(sympy.prod(shape))


def regroup(
    ops: Operands, source: Sequence[sympy.Expr], rows: Rows, target: Sequence[sympy.Expr]
) -> Rows:
    """Where rows go when a row-major tensor of one shape is read as another.

    The tokens keep their place in memory: what is before them (the product of the outer sizes)
    must end at a dimension of the target too, and that dimension must hold whole tokens.
    """
    outer = extent(source[: rows.dim])
    for dim, size in enumerate(target):
        if extent(target[:dim]) != outer or size == 1:
            continue
        multiple = sympy.cancel(size / ops.tokens)
        if not multiple.free_symbols & ops.tokens.free_symbols and _is_whole(multiple):
            return Rows(dim, sympy.expand(multiple))
        break
    raise Refusal(f"{list(source)} -> {list(target)} moves tokens across dimensions")


def _is_whole(multiple: sympy.Expr) -> bool:
    """Whether a polynomial is an integer for all integer sizes: its coefficients are."""
    if not multiple.free_symbols:
        return bool(multiple.is_Integer)
    if not multiple.is_polynomial():
        return False
    return all(c.is_Integer for c in sympy.Poly(multiple, *multiple.free_symbols).coeffs())


def value_shape(tensor: torch.Tensor) -> tuple[sympy.Expr, ...]:
    """The shape as expressions."""
    return tuple(size_expr(size) for size in tensor.shape)
