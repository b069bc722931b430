"""Which implementation of a linear runs for how many rows, as it was measured.

Two tables, by the name of the GPU: the one packaged beside this file, and one in ``cache_dir()`` of
what was measured on this machine (``gemms="measure"``), asked for what the first does not have. A row
of a table says for one weight, one operator and a range of rows what was fastest. What is in neither
table is left to ATen. Nothing is measured here, so that an operator may be captured as it is.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoflow_compiler.config import cache_dir
from nanoflow_compiler.graphs import dtype_name

__all__ = [
    "ATEN",
    "Choice",
    "ChoiceTable",
    "LinearShape",
    "Measured",
    "choose",
    "identity_of",
    "keep",
    "table_of",
]

_LOG = logging.getLogger(__name__)
PACKAGED = Path(__file__).with_name("kernel_choices.json")

Tiling = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One operator on one shape of weights."""

    op: str
    """``linear``, ``linear_add`` or ``gated_linear``."""
    dtype: str
    depth: int
    columns: int
    """Of the weight ``[depth, columns]``: of a gated linear, gate and up together."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An implementation, by its name in ``kernels.linears``, and how it is tiled."""

    implementation: str
    tiling: Tiling = ()


ATEN = Choice("aten")


@dataclass(frozen=True, slots=True)
class Measured:
    """A row of a table: what is fastest from ``rows_from`` to ``rows_to`` rows, both included."""

    shape: LinearShape
    rows_from: int
    rows_to: int
    choice: Choice

    @classmethod
    def parse(cls, row: Mapping[str, Any]) -> "Measured":
        """From a row of JSON."""
        shape = LinearShape(row["op"], row["dtype"], row["depth"], row["columns"])
        tiling = tuple(sorted(row.get("tiling", {}).items()))
        return cls(shape, row["rows_from"], row["rows_to"], Choice(row["implementation"], tiling))

    def as_json(self) -> dict[str, Any]:
        """What :meth:`parse` reads."""
        rows = {"rows_from": self.rows_from, "rows_to": self.rows_to}
        chosen = {"implementation": self.choice.implementation, "tiling": dict(self.choice.tiling)}
        return asdict(self.shape) | rows | chosen


@dataclass(slots=True)
class ChoiceTable:
    """What was measured on one kind of GPU."""

    rows: dict[LinearShape, list[Measured]] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Iterable[Measured]) -> "ChoiceTable":
        """A table of these rows."""
        table = cls()
        table.add(rows)
        return table

    def add(self, rows: Iterable[Measured]) -> None:
        """Take up rows of shapes; of rows that overlap, the first counts."""
        for row in rows:
            self.rows.setdefault(row.shape, []).append(row)

    def measured(self) -> Iterator[Measured]:
        """All rows."""
        for rows in self.rows.values():
            yield from rows

    def serves(self, shape: LinearShape) -> bool:
        """Whether something else than ATen is faster for some number of rows."""
        return any(row.choice != ATEN for row in self.rows.get(shape, ()))

    def choice(self, shape: LinearShape, *, num_rows: int) -> Choice:
        """The fastest for so many rows; ATen where nothing is known."""
        found = (
            row.choice
            for row in self.rows.get(shape, ())
            if row.rows_from <= num_rows <= row.rows_to
        )
        return next(found, ATEN)


def choose(op: str, x: Tensor, weight_t: Tensor) -> Choice:
    """The implementation for ``x [rows, depth]`` and ``weight_t [depth, columns]`` of one GPU."""
    return _choose(op, x.dtype, *weight_t.shape, x.shape[0], x.device)


@cache
def _choose(
    op: str, dtype: torch.dtype, depth: int, columns: int, num_rows: int, device: torch.device
) -> Choice:
    shape = LinearShape(op, dtype_name(dtype), depth, columns)
    return table_of(torch.cuda.get_device_name(device)).choice(shape, num_rows=num_rows)


@cache
def table_of(device_name: str) -> ChoiceTable:
    """What is packaged for this GPU, then what was measured on this machine."""
    table = ChoiceTable.of(_read(PACKAGED, device_name))
    measured = _read(_measured_path(), device_name)
    table.add([row for row in measured if row.shape not in table.rows])
    return table


def identity_of(device_name: str, *, with_measured: bool = True) -> str:
    """Text that differs where the tables of a GPU, as this process uses them, serve other shapes."""
    rows = table_of(device_name).measured() if with_measured else _read(PACKAGED, device_name)
    served = {row.shape for row in rows if row.choice != ATEN}
    return json.dumps(sorted(tuple(map(str, asdict(shape).values())) for shape in served))


def keep(rows: list[Measured], *, device_name: str) -> None:
    """Use what was measured from now on, in this process and in later ones."""
    table_of(device_name).add(rows)
    _choose.cache_clear()
    path = _measured_path()
    all_rows = [*_read(path, device_name), *rows]
    known = _json(path) | {device_name: [row.as_json() for row in all_rows]}
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with suppress(OSError):  # a cache that others share may be read only
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(known, indent=1), encoding="utf-8")
        partial.replace(path)


def _measured_path() -> Path:
    return cache_dir() / "kernel_choices.json"


def _read(path: Path, device_name: str) -> list[Measured]:
    try:
        return [Measured.parse(row) for row in _json(path).get(device_name, ())]
    except (KeyError, TypeError, AttributeError) as error:
        _LOG.warning("%s is not a table of kernels and is left out: %r", path, error)
        return []


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
