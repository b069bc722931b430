"""Sizes and strides of what a cluster reads, in symbols whose values a call can tell.

A symbol is known from an input that has it as a size or stride of its own; ``B * S`` rows tell
neither ``B`` nor ``S``. Such a symbol is computed from the shapes of several inputs where these
tell it, or else taken as 1, if only its product with another counts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import sympy
from torch.utils._sympy.printers import PythonPrinter

from nanoflow_compiler.errors import UnsupportedGraphError

__all__ = ["BoundLayouts", "Layout", "bind_symbols", "python_text"]

Places = dict[sympy.Symbol, str]


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes and strides of a tensor; of a number, itself as the only size and no strides."""

    sizes: tuple[sympy.Expr, ...]
    strides: tuple[sympy.Expr, ...] | None

    def subs(self, values: dict[sympy.Symbol, sympy.Expr]) -> "Layout":
        """The same with other symbols."""
        sizes = tuple(size.subs(values) for size in self.sizes)
        strides = self.strides and tuple(stride.subs(values) for stride in self.strides)
        return replace(self, sizes=sizes, strides=strides)

    def found_in(self, name: str) -> Iterator[tuple[sympy.Expr, str]]:
        """Each size and stride, and Python that finds it in a value of that name."""
        if self.strides is None:
            yield self.sizes[0], name
            return
        yield from ((size, f"{name}.shape[{dim}]") for dim, size in enumerate(self.sizes))
        yield from ((size, f"{name}.stride({dim})") for dim, size in enumerate(self.strides))


@dataclass(frozen=True, slots=True)
class BoundLayouts:
    """Layouts in symbols whose values Python text tells, given the list ``args``."""

    layouts: tuple[Layout, ...]
    places: Places


def bind_symbols(layouts: Sequence[Layout]) -> BoundLayouts:
    """Find where each symbol comes from; raises :class:`UnsupportedGraphError` if nothing tells."""
    exprs: dict[sympy.Expr, str] = {}
    for at, layout in enumerate(layouts):
        for expr, place in layout.found_in(f"args[{at}]"):
            exprs.setdefault(expr, place)
    places = {expr: place for expr, place in exprs.items() if expr.is_Symbol}
    ones: dict[sympy.Symbol, sympy.Expr] = {}
    while unknown := _unknown(exprs, places):
        if solved := _solve(exprs, places):
            symbol, places[symbol] = solved
        else:
            ones[_redundant(exprs, unknown)] = sympy.Integer(1)
            exprs = {expr.subs(ones): place for expr, place in exprs.items()}
            places |= {expr: place for expr, place in exprs.items() if expr.is_Symbol}
    return BoundLayouts(tuple(layout.subs(ones) for layout in layouts), places)


def python_text(expr: sympy.Basic, places: Places) -> str:
    """An expression as Python that computes it."""
    named = {symbol: sympy.Symbol(place) for symbol, place in places.items()}
    return str(PythonPrinter().doprint(expr.subs(named)))


def _unknown(exprs: dict[sympy.Expr, str], places: Places) -> list[sympy.Symbol]:
    """Symbols without a place, in a fixed order."""
    return sorted(set().union(*(e.free_symbols for e in exprs)) - places.keys(), key=str)


def _solve(exprs: dict[sympy.Expr, str], places: Places) -> tuple[sympy.Symbol, str] | None:
    """A symbol that is the only unknown of some size, and linear there, and its value."""
    for expr, place in exprs.items():
        unknown = expr.free_symbols - places.keys()
        if len(unknown) != 1:
            continue
        (symbol,) = unknown
        rest, terms = sympy.expand(expr).as_independent(symbol, as_Add=True)
        factor = sympy.cancel(terms / symbol)
        if symbol not in factor.free_symbols:
            subtracted, divisor = python_text(rest, places), python_text(factor, places)
            return symbol, f"(({place} - ({subtracted})) // ({divisor}))"
    return None


def _redundant(exprs: dict[sympy.Expr, str], unknown: list[sympy.Symbol]) -> sympy.Symbol:
    """An unknown symbol that occurs only in its product with another."""
    for one in unknown:
        for other in unknown:
            as_product = {one: sympy.Integer(1), other: one * other}
            if one != other and all(
                expr.subs(as_product, simultaneous=True) == expr for expr in exprs
            ):
                return one
    sizes = ", ".join(str(expr) for expr in exprs if expr.free_symbols & set(unknown))
    raise UnsupportedGraphError(f"sizes {sizes} do not tell what {unknown[0]} is")
