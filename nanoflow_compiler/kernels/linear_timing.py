"""Times linears on a GPU: which implementation and tiling is the fastest for how many rows.

Calls are captured as a graph over weights that do not fit into the cache together, so that neither
the host nor the cache has a part in it. These are bursts: tables for the long run are packaged, and
were measured at the power limit of the card.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from nanoflow_compiler.errors import UnsupportedGraphError
from nanoflow_compiler.kernel_choice import ATEN, Choice, LinearShape, Measured
from nanoflow_compiler.kernels.linears import Linear, by_aten, by_kernel, choices, gate

__all__ = ["ROW_RANGES", "measure"]

_LOG = logging.getLogger(__name__)
_LAST = 1 << 30
_ENDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
ROW_RANGES = (
    *zip((1, *(end + 1 for end in _ENDS)), _ENDS, strict=False),
    (_ENDS[-1] + 1, _LAST),
)
"""Rows that share a choice; the last of each are measured."""
_COLD_BYTES = 128 << 20
_MOST_WEIGHTS = 16
_REPLAYS = 3
_WORTH = 0.98
"""Share of the time of ATen's below which another implementation is chosen."""
_ADD_SHARE = 1 / 3
"""Of an addition by itself, what it costs inside of the cluster that follows it: one read of three."""


@dataclass(frozen=True, slots=True)
class _Setting:
    """Inputs of one shape and number of rows."""

    shape: LinearShape
    x: Tensor
    weights: list[Tensor]
    residual: Tensor | None

    def time(self, choice: Choice) -> float:
        """Seconds of a call; infinity for what does not run."""
        activation = "silu" if self.shape.op == "gated_linear" else ""

        def call(weight: Tensor) -> Tensor:
            added = {"residual": self.residual, "in_place": self.residual is not None}
            linear = Linear(self.x, weight, activation=activation, **added)  # type: ignore[arg-type]
            result = by_aten(linear) if choice == ATEN else by_kernel(linear, choice=choice)
            if result is None:
                raise UnsupportedGraphError("it cannot take the call")
            return result

        try:
            return _seconds([lambda weight=weight: call(weight) for weight in self.weights])  # type: ignore[misc]
        except Exception as error:  # a tiling that the compiler or the GPU refuses
            _LOG.info("%s of %s does not run: %s", choice, self.shape, error)
            return float("inf")

    def unfused(self) -> float:
        """Seconds of a product by ATen and of what a cluster would do with it."""
        product = torch.mm(self.x, self.weights[0])
        seconds = _seconds([lambda w=weight: torch.mm(self.x, w) for weight in self.weights])  # type: ignore[misc]
        if self.shape.op == "gated_linear":
            seconds += _seconds([lambda: gate(product, activation="silu")])
        elif self.residual is not None:
            seconds += _seconds([lambda: torch.add(product, product)]) * _ADD_SHARE
        return seconds


def measure(shape: LinearShape, *, device: torch.device) -> list[Measured]:
    """Rows of a table for one shape; all of ATen if that is faster on average, with what follows it."""
    try:
        with unset_fake_temporarily(), torch.inference_mode(), torch.cuda.device(device):
            found = [_best(_setting(shape, last, device)) for _, last in ROW_RANGES]
    except torch.cuda.OutOfMemoryError:
        _LOG.info("%s was not measured: there is no memory for it beside the model", shape)
        return [Measured(shape, 1, _LAST, ATEN)]
    shares = [share for _, share in found]
    fuses = sum(shares) / len(shares) < 1
    return [
        Measured(shape, *rows, choice if fuses else ATEN)
        for rows, (choice, _) in zip(ROW_RANGES, found, strict=True)
    ]


def _setting(shape: LinearShape, last: int, device: torch.device) -> _Setting:
    num_rows = min(last, 2 * _ENDS[-1])
    dtype = getattr(torch, shape.dtype)
    count = max(1, min(_MOST_WEIGHTS, _COLD_BYTES // (shape.depth * shape.columns * 2)))

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=dtype, device=device)

    weights = [random(shape.columns, shape.depth).t() for _ in range(count)]
    residual = random(num_rows, shape.columns) if shape.op == "linear_add" else None
    return _Setting(shape, random(num_rows, shape.depth), weights, residual)


def _best(setting: _Setting) -> tuple[Choice, float]:
    """The fastest, and its share of the time without a fused operator."""
    times = {choice: setting.time(choice) for choice in _all(setting)}
    fastest = min(times, key=lambda choice: times[choice])
    chosen = fastest if times[fastest] < _WORTH * times[ATEN] else ATEN
    return chosen, times[chosen] / setting.unfused()


def _all(setting: _Setting) -> Iterator[Choice]:
    yield ATEN
    yield from choices(len(setting.x))


def _seconds(calls: list[Callable[[], Tensor]]) -> float:
    """Of one of the calls, the least of several replays."""
    calls[0]()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times: list[float] = []
    for _ in range(_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(float(start.elapsed_time(end)) / 1e3)
    return min(times) / len(calls)
