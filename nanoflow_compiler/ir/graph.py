"""``OpGraph``: schedulable operations over named values, lifted from an FX graph."""

from dataclasses import dataclass
from enum import StrEnum

__all__ = [
    "Axis",
    "Cost",
    "Op",
    "OpGraph",
    "OpKind",
    "Read",
    "Resource",
    "Value",
    "ValueKind",
    "Work",
]


class Resource(StrEnum):
    """What an operation keeps busy; only operations of different resources gain by overlap."""

    COMPUTE = "compute"
    MEMORY = "memory"
    NETWORK = "network"
    COPY = "copy"
    HOST = "host"


class OpKind(StrEnum):
    """What an operation is, which decides how a backend runs it."""

    GEMM = "gemm"
    ATTENTION = "attention"
    KV_APPEND = "kv_append"
    COLLECTIVE = "collective"
    EXPERTS = "experts"
    CLUSTER = "cluster"
    """Pointwise, norm, gather and shape nodes that are compiled into one kernel."""
    NORM = "norm"
    """A norm of rows with a kernel of ours."""
    VIEW = "view"
    """Shape changes only: no kernel at all."""
    SIZES = "sizes"
    """Integer arithmetic on sizes, done by the host."""
    OTHER = "other"
    """A node without a kernel of ours, run as the ATen operation that it is."""


class ValueKind(StrEnum):
    """What an edge between operations carries."""

    DATA = "data"
    SIZE = "size"
    KV = "kv"
    """Order only: the tokens whose keys and values one layer's cache holds."""
    CONTROL = "control"
    """Order only: an operation that must not run before another has read its input."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Where the token axis lies in a tensor: ``size(dim) == multiple * tokens``, token-major."""

    dim: int
    multiple: str = "1"
    """A positive size expression, for example ``"1"``, ``"8"`` (folded heads) or ``"s1"``."""

    def __str__(self) -> str:
        return f"{self.dim}" if self.multiple == "1" else f"{self.dim}*{self.multiple}"


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor or size. ``axis`` is None for a value that exists once, whole."""

    name: str
    kind: ValueKind
    shape: tuple[str, ...] = ()
    dtype: str = ""
    axis: Axis | None = None

    def __str__(self) -> str:
        if self.kind is not ValueKind.DATA:
            return f"{self.name}: {self.kind}"
        axis = f" tokens@{self.axis}" if self.axis else ""
        return f"{self.name}: {self.dtype}[{', '.join(self.shape)}]{axis}"


@dataclass(frozen=True, slots=True)
class Read:
    """How an operation reads a value: whole, aligned with its own tokens, or up to them."""

    value: str
    axis: Axis | None = None
    prefix: bool = False
    """Reads tokens from 0 to the end of its own range (attention on its layer's KV cache)."""

    def __str__(self) -> str:
        if self.prefix:
            return f"{self.value}[:]"
        return f"{self.value}@{self.axis}" if self.axis else self.value


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs and bytes as linear functions of the tokens, exact for row-independent operations."""

    flops_per_token: float = 0.0
    flops_fixed: float = 0.0
    bytes_per_token: float = 0.0
    bytes_fixed: float = 0.0
    link_bytes_per_token: float = 0.0
    dtype: str = "float32"

    def flops(self, tokens: float) -> float:
        """FLOPs for ``tokens`` tokens."""
        return self.flops_fixed + tokens * self.flops_per_token

    def bytes(self, tokens: float) -> float:
        """Bytes read and written in device memory for ``tokens`` tokens."""
        return self.bytes_fixed + tokens * self.bytes_per_token

    def link_bytes(self, tokens: float) -> float:
        """Bytes over the links between devices for ``tokens`` tokens."""
        return tokens * self.link_bytes_per_token


@dataclass(frozen=True, slots=True)
class Cost:
    """Predicted time alone on the device, energy, and what bounds it."""

    time_us: float
    joules: float
    bound: Resource


@dataclass(frozen=True, slots=True)
class Op:
    """One schedulable operation: some FX nodes with what they read and write."""

    name: str
    kind: OpKind
    resource: Resource
    nodes: tuple[str, ...]
    reads: tuple[Read, ...]
    writes: tuple[str, ...]
    splits: bool
    """Whether it may run in parts along the token axis."""
    label: str = ""
    """What a person calls it: ``"add + rms_norm"``, ``"mm [2304, 576]"``."""
    reason: str = ""
    """Why it mixes tokens, for an operation that must run whole after parts (a join)."""
    layer: int | None = None
    """Which of the repeated layers it belongs to, if any."""
    signature: str = ""
    """Equal for operations that compute the same function of equally shaped inputs."""
    work: Work = Work()
    cost: Cost | None = None

    def __str__(self) -> str:
        how = "parts" if self.splits else "whole"
        why = f"  # join: {self.reason}" if self.reason else ""
        time = f" {self.cost.time_us:.1f}us/{self.cost.bound}" if self.cost else ""
        reads = ", ".join(map(str, self.reads))
        label = f" '{self.label}'" if self.label else ""
        return (
            f"{self.name} = {self.kind}{label} {how} {self.resource}{time}"
            f" ({reads}) -> {', '.join(self.writes)}{why}"
        )


@dataclass(frozen=True, slots=True)
class OpGraph:
    """Operations in a topological order of their data. Inputs and outputs are value names."""

    ops: tuple[Op, ...]
    values: tuple[Value, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tokens: int
    """Tokens (rows of the split axis) that costs are estimated for."""
    num_layers: int = 0

    def by_name(self) -> dict[str, Op]:
        """Operations by name."""
        return {op.name: op for op in self.ops}

    def value_by_name(self) -> dict[str, Value]:
        """Values by name."""
        return {value.name: value for value in self.values}

    def __str__(self) -> str:
        head = f"op graph: {len(self.ops)} ops, {self.num_layers} layers, tokens={self.tokens}"
        values = self.value_by_name()
        inputs = [f"  in {values[name]}" for name in self.inputs]
        return "\n".join([head, *inputs, *_op_lines(self.ops), f"  out {', '.join(self.outputs)}"])


def _op_lines(ops: tuple[Op, ...]) -> list[str]:
    lines: list[str] = []
    layer: int | None = None
    for op in ops:
        if op.layer != layer:
            layer = op.layer
            lines.append(f"  # layer {layer}" if layer is not None else "  # outside the layers")
        lines.append(f"  {op}")
    return lines
