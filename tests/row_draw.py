"""Random operands with tokens in them, from which the cases of the TOKEN rules are made."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from rows_of_nodes import Case, Operand

aten = torch.ops.aten

Make = Callable[[Any, Any], Case]
CASES: dict[Any, Make] = {}


def case(names: str) -> Callable[[Make], Make]:
    """Register a maker of cases for the packets of these names that the installed torch has."""

    def register(make: Make) -> Make:
        for name in names.split():
            if hasattr(aten, name):
                CASES[getattr(aten, name)] = make
        return make

    return register


class Draw:
    """Random shapes with tokens in them. Other sizes may equal the number of tokens: the traps."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.tokens = draw(st.integers(2, 5))
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def chance(self) -> bool:
        return self.draw(st.booleans())

    def of(self, items: Any) -> Any:
        return self.draw(st.sampled_from(list(items)))

    def sizes(self, count: int, low: int = 1, high: int = 5) -> list[int]:
        return [self.number(low, high) for _ in range(count)]

    def multiple(self) -> int:
        return self.of([1, 1, 2, 3])

    def floats(self, shape: Any) -> torch.Tensor:
        return torch.randn(list(shape), generator=self.generator, dtype=torch.float64)

    def ints(self, shape: Any, high: int) -> torch.Tensor:
        return torch.randint(0, high, list(shape), generator=self.generator)

    def rows(
        self, shape: list[int], dim: int, multiple: int = 1, *, is_seed: bool = True
    ) -> Operand:
        shape[dim] = self.tokens * multiple
        return Operand(self.floats(shape), dim, multiple, is_seed)

    def tensor(self, *, low: int = 1, high: int = 4) -> Operand:
        """A float tensor of ``low`` to ``high`` dimensions, one of which holds the tokens."""
        shape = self.sizes(self.number(low, high))
        return self.rows(shape, self.number(0, len(shape) - 1), self.multiple())

    def sign(self, dim: int, rank: int) -> int:
        """The same dimension, perhaps counted from the end."""
        return dim - rank if self.chance() else dim

    def beside(self, x: Operand) -> Operand:
        """An operand that broadcasts with ``x`` or lines up with it, with tokens or without."""
        shape = list(x.value.shape)
        rank = len(shape)
        assert x.dim is not None
        start = self.number(0, rank)
        shape = [1 if self.chance() else size for size in shape]
        own = self.chance()
        shape[x.dim] = x.value.shape[x.dim] if own else 1
        kept = shape[start:]
        if own and start <= x.dim:
            at = x.dim - start
            return Operand(self.floats(kept), at, x.multiple, is_seed=self.chance())
        return Operand(self.floats(kept))

    def case(self, target: Any, *args: Any, mixes: bool = False, **kwargs: Any) -> Case:
        return Case(target, args, kwargs, self.tokens, mixes)


def rank(x: Operand) -> int:
    return x.value.ndim
