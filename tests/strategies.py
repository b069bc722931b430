"""Random values of the compiler: op graphs that verify, and what the passes make of them.

The graphs are of any shape that the rules allow, not only those that models have: operations of all
kinds and resources, cut or whole, that read values whole, aligned with their own tokens or up to them,
and write data, caches or mere order.
"""

from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from nanoflow_compiler.hardware import DEVICE_SPECS, DeviceSpec
from nanoflow_compiler.ir import (
    Axis,
    NanoGraph,
    Op,
    OpGraph,
    OpKind,
    Program,
    Read,
    Resource,
    Schedule,
    Value,
    ValueKind,
    Work,
)
from nanoflow_compiler.passes.emit import emit
from nanoflow_compiler.passes.estimate import estimate
from nanoflow_compiler.passes.nano_split import nano_split
from nanoflow_compiler.passes.schedule import schedule

MOST_PARTS = 4
MOST_LANES = 4


def device_specs() -> st.SearchStrategy[DeviceSpec]:
    """The devices that we know, and an H200 with fewer SMs."""
    known = list(DEVICE_SPECS.values())
    small = st.integers(1, 20).map(lambda sms: replace(DEVICE_SPECS["h200-sxm"], num_sms=sms))
    return st.sampled_from(known) | small


def works() -> st.SearchStrategy[Work]:
    """From nothing at all to a large GEMM."""
    amounts = st.sampled_from([0.0, 1.0, 1e5, 1e8, 1e10])
    return st.builds(
        Work,
        flops_per_token=amounts,
        flops_fixed=amounts,
        bytes_per_token=amounts,
        bytes_fixed=amounts,
        link_bytes_per_token=amounts,
        dtype=st.sampled_from(["float32", "bfloat16", "float8", "int64"]),
    )


@dataclass
class _Builder:
    draw: Any
    values: list[Value]
    ops: list[Op]

    def axis(self) -> Axis:
        return Axis(self.draw(st.integers(0, 3)), self.draw(st.sampled_from(["1", "8", "s1"])))

    def add_op(self, number: int) -> None:
        splits = self.draw(st.integers(0, 3)) > 0
        picked = self.draw(st.lists(st.sampled_from(self.values), max_size=4, unique=True))
        reads = [read for value in picked for read in self.reads(value, splits=splits)]
        made = [self.value(f"v{number}_{at}", splits=splits) for at in range(self.count())]
        kind = self.draw(st.sampled_from(OpKind))
        op = Op(
            name=f"{kind}_{number}",
            kind=kind,
            resource=self.draw(st.sampled_from(Resource)),
            nodes=(),
            reads=tuple(dict.fromkeys(reads)),
            writes=tuple(value.name for value in made),
            splits=splits,
            work=self.draw(works()),
        )
        self.ops.append(op)
        self.values.extend(made)

    def count(self) -> int:
        return self.draw(st.sampled_from([1, 1, 1, 2, 0]))

    def value(self, name: str, *, splits: bool) -> Value:
        kinds = [ValueKind.DATA] * 3 + [ValueKind.KV, ValueKind.CONTROL]
        kind = self.draw(st.sampled_from(kinds if splits else [*kinds, ValueKind.SIZE]))
        if kind in (ValueKind.KV, ValueKind.CONTROL):
            return Value(f"!{name}", kind)
        if kind is ValueKind.SIZE:
            return Value(name, kind)
        return Value(name, kind, ("s0", "4"), "float32", self.axis() if splits else None)

    def reads(self, value: Value, *, splits: bool) -> list[Read]:
        """The ways in which an operation may read a value; sometimes two at once."""
        if not splits or value.kind in (ValueKind.SIZE, ValueKind.CONTROL):
            return [Read(value.name)]
        if value.kind is ValueKind.KV:
            return [Read(value.name, prefix=True)]
        aligned = Read(value.name, value.axis or self.axis())
        ways = [[aligned], [aligned], [Read(value.name)], [Read(value.name), aligned]]
        return self.draw(st.sampled_from(ways))


@st.composite
def op_graphs(draw: Any, *, most_ops: int = 10) -> OpGraph:
    """Random DAGs of operations; every one satisfies ``verify``."""
    inputs = [
        Value(f"in{at}", ValueKind.DATA, ("s0", "4"), "float32")
        for at in range(draw(st.integers(1, 3)))
    ]
    inputs += [Value("s0", ValueKind.SIZE)] if draw(st.booleans()) else []
    builder = _Builder(draw, list(inputs), [])
    for number in range(draw(st.integers(1, most_ops))):
        builder.add_op(number)
    data = [value.name for value in builder.values if not value.name.startswith("!")]
    outputs = draw(st.lists(st.sampled_from(data), min_size=1, max_size=3, unique=True))
    return OpGraph(
        ops=tuple(builder.ops),
        values=tuple(builder.values),
        inputs=tuple(value.name for value in inputs),
        outputs=tuple(outputs),
        tokens=draw(st.sampled_from([1, 7, 64, 2048])),
    )


@st.composite
def nano_graphs(draw: Any, *, device: DeviceSpec, most_ops: int = 10) -> NanoGraph:
    """Cut into like numbers of parts, or into a number for each operation."""
    graph = estimate(draw(op_graphs(most_ops=most_ops)), device=device)
    numbers = st.integers(1, MOST_PARTS)
    each = st.fixed_dictionaries({op.name: st.integers(1, 3) for op in graph.ops})
    return nano_split(graph, parts=draw(numbers | each), device=device)


@st.composite
def plans(draw: Any, *, most_ops: int = 10) -> Schedule:
    """Schedules on one to four lanes of any device."""
    device = draw(device_specs())
    nano = draw(nano_graphs(device=device, most_ops=most_ops))
    return schedule(nano, device=device, lanes=draw(st.integers(1, MOST_LANES)))


def programs(*, most_ops: int = 10) -> st.SearchStrategy[Program]:
    """Emitted programs."""
    return plans(most_ops=most_ops).map(emit)
