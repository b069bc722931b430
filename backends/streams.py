"""streams: the source of codegen, with every lane a CUDA stream and every event an event.

Lane 0 is the stream that is current when the program is called; it begins and ends the program. The
program may be launched, or captured as a CUDA graph. Tensors are deleted where their memory can be
used again, which :mod:`nanoflow_compiler.backends.lifetimes` finds out.
"""

from pathlib import Path
from typing import Any

import torch

from nanoflow_compiler.backends.clusters import Kernels
from nanoflow_compiler.backends.codegen import CodegenExecutable, write
from nanoflow_compiler.backends.lanes import (
    Budgets,
    CudaStreams,
    lane_streams,
    running_lanes,
)
from nanoflow_compiler.backends.source import Function
from nanoflow_compiler.backends.unit import Unit, attention_parts, device_of
from nanoflow_compiler.errors import ConfigError
from nanoflow_compiler.ir import Program

__all__ = ["StreamsExecutable", "build"]


def build(
    program: Program,
    *,
    unit: Unit,
    kernels: Kernels,
    clusters: str,
    path: Path | None,
    budgets: Budgets,
) -> CodegenExecutable:
    """A program of one lane is that of codegen."""
    device = device_of(unit)
    if device.type != "cuda":
        raise ConfigError('backend "streams" needs a GPU; use backend="codegen" on a CPU')
    has_lanes = program.num_lanes > 1
    num_sms = budgets.num_sms if has_lanes else None
    function = write(
        program, unit=unit, kernels=kernels, clusters=clusters, path=path, num_sms=num_sms
    )
    parts, cells = attention_parts(program, unit), program.num_cells
    if not has_lanes:
        return CodegenExecutable(function, parts=parts, cells=cells, path=path)
    return StreamsExecutable(
        function, parts=parts, cells=cells, path=path, device=device, budgets=budgets
    )


class StreamsExecutable(CodegenExecutable):
    """The generated function, and the streams that it runs on."""

    def __init__(
        self,
        function: Function,
        *,
        parts: tuple[tuple[int, int], ...],
        cells: int,
        device: torch.device,
        budgets: Budgets,
        path: Path | None = None,
    ) -> None:
        super().__init__(function, parts=parts, cells=cells, path=path)
        self.device = device
        self.budgets = budgets
        # What the device lacks is told when the program is made.
        _, self.budget_kind = lane_streams(device, budgets)

    def __call__(self, inputs: list[Any], cuts: tuple[int, ...]) -> list[Any]:
        """Outputs in the order of the graph, on the stream that is current."""
        seats, kind = lane_streams(self.device, self.budgets)
        with (
            torch.cuda.device(self.device),
            running_lanes(CudaStreams(self.device), seats, kind=kind) as lanes,
        ):
            result: list[Any] = self._run(inputs, cuts, lanes)
        return result
