"""What ``axis`` says of a node: ``meta["axis"]``, written by passes and read by backends."""

from dataclasses import dataclass, field
from enum import StrEnum

import sympy

__all__ = ["NodeAxis", "Placed", "Rows", "Status"]


class Status(StrEnum):
    """How a node relates to the token axis."""

    TOKEN = "token"
    JOIN = "join"
    SHARED = "shared"
    SIZE = "size"


@dataclass(frozen=True, slots=True)
class Rows:
    """``size(dim) == multiple * tokens``, the entries of one token adjacent, tokens in order."""

    dim: int
    multiple: sympy.Expr

    def __str__(self) -> str:
        return f"dim {self.dim}" + ("" if self.multiple == 1 else f" x{self.multiple}")


Placed = Rows | None | tuple[Rows | None, ...]


@dataclass(frozen=True, slots=True)
class NodeAxis:
    """What ``axis`` says of one node; ``rows`` of a tuple are those of its elements."""

    status: Status
    rows: Placed = None
    reads: dict[str, Rows | None] = field(default_factory=dict)
    reason: str = ""

    def __str__(self) -> str:
        where = f" {self.rows}" if isinstance(self.rows, Rows) else ""
        return f"{self.status}{where}" + (f": {self.reason}" if self.reason else "")
