"""cuda_graph: the program of streams, captured as a CUDA graph for each distinct call.

Calls are alike if shapes, layouts and types of their inputs are. The first of a kind is launched, the
second captured, and from then on a call is a copy of its inputs and a replay. What belongs to the model,
and what the program writes to (a static KV cache), is read and written where it is: its address is a part
of the kind. Results are copies: no later call changes them.

A program that attends to the engine's paged cache is launched: the engine captures whole steps itself.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from nanoflow_compiler.backends import Executable, streams
from nanoflow_compiler.backends.clusters import Kernels
from nanoflow_compiler.backends.lanes import Budgets
from nanoflow_compiler.backends.unit import Unit, device_of, takes_part
from nanoflow_compiler.errors import ConfigError
from nanoflow_compiler.graph_pool import GraphPool, failed_at, reason_of
from nanoflow_compiler.graphs import call_nodes
from nanoflow_compiler.ir import Program

__all__ = ["MAX_GRAPHS", "CudaGraphExecutable", "build", "written_inputs"]

MAX_GRAPHS = 32
_MAX_PENDING = 8
"""Kinds of calls that came once."""


def build(
    program: Program,
    *,
    unit: Unit,
    kernels: Kernels,
    clusters: str,
    path: Path | None,
    budgets: Budgets,
) -> Executable:
    """Nothing is captured before it is called."""
    device = device_of(unit)
    if device.type != "cuda":
        raise ConfigError('backend "cuda_graph" needs a GPU; use backend="codegen" on a CPU')
    launched = streams.build(
        program, unit=unit, kernels=kernels, clusters=clusters, path=path, budgets=budgets
    )
    if any(takes_part(node) for node in unit.module.graph.nodes):
        return launched
    stays = written_inputs(unit.module) | unit.buffers
    return CudaGraphExecutable(
        launched,
        weights=frozenset(at for at, name in enumerate(program.inputs) if name in unit.fixed),
        stays=frozenset(at for at, name in enumerate(program.inputs) if name in stays),
        device=device,
    )


def written_inputs(module: fx.GraphModule) -> frozenset[str]:
    """Inputs that the graph writes to, themselves or through views."""
    found: set[str] = set()
    for node in call_nodes(module):
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            for argument in node.target._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    found |= _sources(_given(node, argument.name))
    return frozenset(found)


def _given(node: fx.Node, name: str) -> Any:
    """What a call has for an argument."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    return dict(zip(names, node.args, strict=False)).get(name, node.kwargs.get(name))


def _sources(value: Any) -> set[str]:
    """The inputs that a value may lie in."""
    if isinstance(value, list | tuple):
        return {name for item in value for name in _sources(item)}
    if not isinstance(value, fx.Node):
        return set()
    if value.op in ("placeholder", "get_attr"):
        return {value.name}
    if isinstance(value.target, torch._ops.OpOverload):
        returns = value.target._schema.returns
        if all(item.alias_info is None for item in returns):
            return set()
    return _sources(value.all_input_nodes)


@dataclass(slots=True)
class _Kind:
    """Of a call: where its inputs are put, and the graph when there is one."""

    inputs: list[Any]
    copied: list[int]
    graph: torch.cuda.CUDAGraph | None = None
    outputs: Sequence[Any] = ()

    def fill(self, values: Sequence[Any]) -> None:
        """Bring the inputs of a call to their places."""
        for at in self.copied:
            self.inputs[at].copy_(values[at])


class CudaGraphExecutable:
    """A program whose calls are captured."""

    def __init__(
        self,
        launched: Executable,
        *,
        weights: frozenset[int],
        stays: frozenset[int],
        device: torch.device,
    ) -> None:
        self.source = launched.source
        self.num_cells = launched.num_cells
        self.attention_parts = launched.attention_parts
        self.launched = launched
        self._weights = weights
        self._stays = stays
        self._device = device
        self._captured: dict[Hashable, _Kind] = {}
        self._pending: OrderedDict[Hashable, _Kind] = OrderedDict()
        self._pool: GraphPool | None = None
        self._lock = threading.Lock()
        self._last: torch.cuda.Event | None = None
        """The end of the last call: the next one may come on another stream, and writes its inputs."""
        self._has_stopped = False
        """Nothing more is captured; the graphs that there are stay in use."""

    def __call__(self, inputs: list[Any], cuts: tuple[int, ...]) -> list[Any]:
        """Outputs in the order of the graph; nothing changes them later."""
        is_launched = self._has_stopped and not self._captured
        if is_launched or torch.cuda.is_current_stream_capturing():
            return self.launched(inputs, cuts)
        with self._lock:
            stream = torch.cuda.current_stream(self._device)
            if self._last is not None:
                stream.wait_event(self._last)
            try:
                return self._call(inputs, cuts)
            finally:
                self._last = torch.cuda.Event()
                self._last.record(stream)

    def _call(self, inputs: list[Any], cuts: tuple[int, ...]) -> list[Any]:
        key = self._key(inputs, cuts)
        kind = self._captured.get(key)
        if kind is None:
            return self._not_captured(key, inputs, cuts)
        assert kind.graph is not None
        kind.fill(inputs)
        kind.graph.replay()
        return _copies(kind.outputs, held=inputs)

    def close(self) -> None:
        """Release graphs and program; it must not be called afterwards."""
        self._captured.clear()
        self._pending.clear()
        self._pool = None
        self.launched.close()

    def _key(self, inputs: Sequence[Any], cuts: tuple[int, ...]) -> Hashable:
        return (cuts, *(self._described(at, value) for at, value in enumerate(inputs)))

    def _described(self, at: int, value: Any) -> Hashable:
        if not isinstance(value, Tensor):
            found: Hashable = value
            return found
        place = value.data_ptr() if at in self._weights or at in self._stays else None
        if at in self._weights:  # many, and of a layout that is the model's
            return place
        return (place, value.shape, value.stride(), value.dtype, value.device)

    def _not_captured(self, key: Hashable, inputs: list[Any], cuts: tuple[int, ...]) -> list[Any]:
        refusal = None if self._has_stopped else self._refusal(inputs)
        if refusal:
            self._stop(refusal)
        if self._has_stopped:
            return self.launched(inputs, cuts)
        kind = self._pending.pop(key, None)
        if kind is None:
            return self._first(key, inputs, cuts)
        kind.fill(inputs)
        try:
            with torch.cuda.device(self._device):
                self._pool = self._pool or GraphPool()
                kind.graph, kind.outputs = self._pool.capture_held(
                    lambda: self.launched(list(kind.inputs), cuts)
                )
        except Exception as error:  # whatever a capture trips over, launched it may run
            self._stop(f"{reason_of(error)}{failed_at(error)}")
            return self.launched(inputs, cuts)
        self._captured[key] = kind
        kind.graph.replay()
        return _copies(kind.outputs, held=inputs)

    def _first(self, key: Hashable, inputs: list[Any], cuts: tuple[int, ...]) -> list[Any]:
        """Launched, with inputs where a graph would have them: so nothing is new to its capture."""
        kind = self._placed(inputs)
        self._pending[key] = kind
        if len(self._pending) > _MAX_PENDING:
            self._pending.popitem(last=False)
        return _copies(self.launched(list(kind.inputs), cuts), held=inputs)

    def _placed(self, inputs: Sequence[Any]) -> _Kind:
        stays = self._weights | self._stays
        copied = [
            at for at, item in enumerate(inputs) if isinstance(item, Tensor) and at not in stays
        ]
        placed = list(inputs)
        with torch.inference_mode(False), torch.no_grad():
            for at in copied:
                like = inputs[at]
                placed[at] = torch.empty_strided(
                    like.size(), like.stride(), dtype=like.dtype, device=like.device
                )
        kind = _Kind(placed, copied)
        kind.fill(inputs)
        return kind

    def _refusal(self, inputs: Sequence[Any]) -> str | None:
        if len(self._captured) >= MAX_GRAPHS:
            return f"there are {MAX_GRAPHS} graphs already"
        tensors = [item for item in inputs if isinstance(item, Tensor)]
        if not all(map(on_gpu, tensors)):
            return "an input is on the CPU, where a graph cannot read it"
        if any(torch._debug_has_internal_overlap(tensor) == 1 for tensor in tensors):
            return "entries of an input share their memory"
        return None

    def _stop(self, reason: str) -> None:
        self._has_stopped = True
        self._pending.clear()
        warnings.warn(
            f"no more calls are captured as CUDA graphs, they run launched: {reason}", stacklevel=4
        )


def on_gpu(tensor: Tensor) -> bool:
    """A graph reads no other memory."""
    return tensor.device.type == "cuda"


def _copies(outputs: Sequence[Any], *, held: Sequence[Any]) -> list[Any]:
    """Those that are not the caller's own; what shares memory in a program shares it here."""
    own = {_storage(item) for item in held if isinstance(item, Tensor)}
    shared = [_storage(item) for item in outputs if isinstance(item, Tensor)]
    copied: dict[int, Tensor] = {}
    result: list[Any] = []
    for item in outputs:
        if not isinstance(item, Tensor) or _storage(item) in own:
            result.append(item)
        elif shared.count(_storage(item)) == 1:
            result.append(item.clone())
        else:
            result.append(_view_of_copy(item, copied))
    return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _view_of_copy(item: Tensor, copied: dict[int, Tensor]) -> Tensor:
    at = _storage(item)
    if at not in copied:
        whole = torch.empty(0, dtype=torch.uint8, device=item.device)
        copied[at] = whole.set_(item.untyped_storage()).clone()
    made = torch.empty(0, dtype=item.dtype, device=item.device)
    return made.set_(
        copied[at].untyped_storage(), item.storage_offset(), item.size(), item.stride()
    )
