"""The compile-time values: ``OpGraph -> NanoGraph -> Schedule -> Program``.

All are frozen, hold no tensors, and never import torch; FX nodes appear in them by name.
``verify`` (in :mod:`nanoflow_compiler.ir.verify`) checks the rule of each.
"""

from nanoflow_compiler.ir.graph import (
    Axis,
    Cost,
    Op,
    OpGraph,
    OpKind,
    Read,
    Resource,
    Value,
    ValueKind,
    Work,
)
from nanoflow_compiler.ir.nano import Edge, NanoGraph, NanoOp
from nanoflow_compiler.ir.program import (
    Instruction,
    Launch,
    Merge,
    Program,
    Record,
    Span,
    Split,
    Wait,
)
from nanoflow_compiler.ir.schedule import Schedule, Slot

__all__ = [
    "Axis",
    "Cost",
    "Edge",
    "Instruction",
    "Launch",
    "Merge",
    "NanoGraph",
    "NanoOp",
    "Op",
    "OpGraph",
    "OpKind",
    "Program",
    "Read",
    "Record",
    "Resource",
    "Schedule",
    "Slot",
    "Span",
    "Split",
    "Value",
    "ValueKind",
    "Wait",
    "Work",
]
