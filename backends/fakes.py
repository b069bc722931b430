"""Fake inputs in a shape environment of their own."""

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from nanoflow_compiler.backends.layouts import Layout
from nanoflow_compiler.graphs import size_expr, symbol_hint

__all__ = ["TOKENS", "Fakes"]

TOKENS = sympy.Symbol("tokens", integer=True, positive=True)
"""The tokens of a part, whatever they are in a call."""


class Fakes:
    """Stand-ins for values of a trace, over fresh symbols for its symbols and for the tokens.

    A symbol is made when it is first used: Inductor keeps a kernel under conditions on every symbol
    of the environment, and later cannot read them for one that is in no input.
    """

    def __init__(self, values: Sequence[Any], *, tokens: int) -> None:
        self._shapes = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self._shapes)
        self._symbols: dict[sympy.Symbol, torch.SymInt] = {}
        self._seen = {TOKENS: max(tokens, 2)}
        for value in values:
            self._seen |= _seen_in(value)

    @property
    def guards(self) -> list[sympy.Basic]:
        """What was assumed of the fresh symbols since."""
        return [guard.expr for guard in self._shapes.guards]

    def like(self, value: Any, layout: Layout) -> Any:
        """A stand-in for a value, laid out as said."""
        if layout.strides is None:
            return self.size(layout.sizes[0]) if isinstance(value, torch.SymInt) else value
        sizes, strides = map(self.size, layout.sizes), map(self.size, layout.strides)
        with self.mode:
            return torch.empty_strided([*sizes], [*strides], dtype=value.dtype, device=value.device)

    def size(self, expr: sympy.Expr) -> Any:
        """The size that an expression stands for; numbers stay numbers."""
        if expr.is_Integer:
            return int(expr)
        for symbol in sorted(expr.free_symbols - self._symbols.keys(), key=str):
            self._symbols[symbol] = self._fresh(symbol, self._seen[symbol])
        return sympy_interp(PythonReferenceAnalysis, dict(self._symbols), expr)

    def _fresh(self, symbol: sympy.Symbol, hint: int) -> torch.SymInt:
        source = ConstantSource(f"nanoflow_{symbol}")
        fresh = self._shapes.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
        size = self._shapes.create_symintnode(fresh, hint=hint, source=source)
        assert isinstance(size, torch.SymInt)
        return size


def _seen_in(value: Any) -> dict[sympy.Symbol, int]:
    """The symbols of a value, with what the trace saw for them."""
    sizes = [*value.shape, *value.stride()] if isinstance(value, torch.Tensor) else [value]
    return {
        symbol: symbol_hint(size, symbol)
        for size in sizes
        if isinstance(size, torch.SymInt)
        for symbol in size_expr(size).free_symbols
    }
