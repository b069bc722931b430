"""From a captured graph to something that runs: the pipeline, once for every candidate of parts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from nanoflow_compiler.backends import Executable, get_backend
from nanoflow_compiler.backends.binding import InputBinder, write_binding
from nanoflow_compiler.backends.clusters import Kernels
from nanoflow_compiler.backends.gemm_timing import GemmShape
from nanoflow_compiler.backends.gemms import GemmChoice, choose_packed
from nanoflow_compiler.backends.lanes import Budgets
from nanoflow_compiler.backends.rows import even_cuts
from nanoflow_compiler.backends.unit import Unit, device_of
from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.hardware import DeviceSpec
from nanoflow_compiler.ir import OpGraph, Resource, Schedule
from nanoflow_compiler.kernel_serving import serving_of
from nanoflow_compiler.passes.axis import axis
from nanoflow_compiler.passes.emit import emit
from nanoflow_compiler.passes.epilogue import epilogue
from nanoflow_compiler.passes.estimate import estimate
from nanoflow_compiler.passes.fuse import fuse
from nanoflow_compiler.passes.lift import bound_nodes, lift
from nanoflow_compiler.passes.nano_split import nano_split
from nanoflow_compiler.passes.normalize import normalize
from nanoflow_compiler.passes.norms import norms
from nanoflow_compiler.passes.rotary_append import rotary_append
from nanoflow_compiler.passes.schedule import schedule
from nanoflow_compiler.stepper import Stepper

__all__ = [
    "Analysed",
    "CapturedGraph",
    "CompiledGraph",
    "analyse",
    "analyse_graph",
    "compile_analysed",
    "compile_graph",
]

_AUTO_PARTS = (2, 3, 4)


@dataclass(frozen=True, slots=True)
class CapturedGraph:
    """An ATen graph, and what its placeholders are."""

    module: fx.GraphModule
    weights: tuple[str, ...]
    """Placeholders that are parameters."""
    seeds: tuple[tuple[str, int], ...]
    """Placeholders and dimensions that hold the tokens; empty where nothing can be split."""
    tokens: int
    """Tokens to plan for."""
    kv_tokens: int = 512
    """Tokens of context that each of them attends to, where a cache is paged."""
    buffers: tuple[str, ...] = ()
    """Placeholders that belong to the model and are no parameters."""


def analyse(captured: CapturedGraph, *, config: CompileConfig, step: Stepper) -> OpGraph:
    """The passes before any choice of parts; annotates and rewrites the captured module."""
    weights = frozenset(captured.weights)
    graph = step(normalize, captured.module)
    graph = step(fuse, graph, weights=weights, merge=config.fuse)
    if (serving := serving_of(graph, config=config)) is not None:
        graph = step(epilogue, graph, weights=weights, serves=serving.linear)
        graph = step(norms, graph, weights=weights, serves=serving.norm)
        graph = step(rotary_append, graph, serves=serving.rotary)
    graph = step(axis, graph, seeds=captured.seeds)
    return step(lift, graph, weights=weights, tokens=captured.tokens, kv_tokens=captured.kv_tokens)


@dataclass(frozen=True, slots=True)
class Analysed:
    """What does not depend on the choice of parts, lanes and budgets: several plans may share it."""

    unit: Unit
    kernels: Kernels
    binder: InputBinder
    tokens_at: tuple[int, int] | None
    measured: tuple[GemmShape, ...]


def compile_graph(
    captured: CapturedGraph,
    *,
    config: CompileConfig,
    device: DeviceSpec,
    step: Stepper,
) -> "CompiledGraph":
    """Run the whole pipeline; the unsplit program is always built too."""
    analysed = analyse_graph(captured, config=config, device=device, step=step)
    return compile_analysed(analysed, config=config, device=device, step=step)


def analyse_graph(
    captured: CapturedGraph, *, config: CompileConfig, device: DeviceSpec, step: Stepper
) -> Analysed:
    """The first half of the pipeline."""
    ops = step(estimate, analyse(captured, config=config, step=step), device=device)
    weights = frozenset(captured.weights)
    bound = bound_nodes(captured.module, weights)
    fixed = weights | {node.name for node in bound}
    unit = Unit.of(ops, captured.module)
    gemms = _choose_gemms(unit, fixed=fixed, config=config)
    layout, names = write_binding(
        captured.module,
        inputs=ops.inputs,
        weights=captured.weights,
        bound=bound,
        packed=gemms.packed,
    )
    unit = replace(unit, packed=gemms.packed, fixed=fixed, buffers=frozenset(captured.buffers))
    binder = InputBinder(layout, names)
    return Analysed(unit, Kernels(), binder, _tokens_of(captured), gemms.measured)


def compile_analysed(
    analysed: Analysed, *, config: CompileConfig, device: DeviceSpec, step: Stepper
) -> "CompiledGraph":
    """The second half, which may be run again with other options."""
    unit, ops = analysed.unit, analysed.unit.graph
    whole = _plan(ops, parts=1, config=config, device=device, step=step)
    chosen, decision = _choose(whole, ops, config=config, device=device, step=step)
    step.note("decision", decision)
    plans = [whole] if chosen is whole else [whole, chosen]
    executables = [
        _build(plan, unit, analysed.kernels, config=config, step=step, name=f"program_{at}")
        for at, plan in enumerate(plans)
    ]
    for cluster, source in analysed.kernels.sources.items():
        step.note(cluster, source)
    step.note("binding", analysed.binder.layout.source)
    return CompiledGraph(
        tuple(executables),
        analysed.binder,
        analysed.kernels,
        decision,
        analysed.tokens_at,
        tuple(plans),
        analysed.measured,
    )


def _choose_gemms(unit: Unit, *, fixed: frozenset[str], config: CompileConfig) -> GemmChoice:
    """The reference backend takes every operation as the graph has it."""
    if config.backend == "reference":
        return GemmChoice()
    return choose_packed(unit, fixed=fixed, mode=config.gemms)


def _plan(
    ops: OpGraph, *, parts: int, config: CompileConfig, device: DeviceSpec, step: Stepper
) -> Schedule:
    nano = step(nano_split, ops, parts=parts, device=device)
    lanes = _lanes(ops, device) if config.lanes == "auto" else config.lanes
    lanes = 1 if parts == 1 else lanes
    return step(schedule, nano, device=device, lanes=lanes, memory_sms=config.memory_sms)


def _lanes(ops: OpGraph, device: DeviceSpec) -> int:
    """One lane for each resource that the graph uses, as far as the device runs them at once."""
    used = {op.resource for op in ops.ops} - {Resource.HOST}
    return max(1, min(device.max_lanes, len(used)))


def _choose(
    whole: Schedule, ops: OpGraph, *, config: CompileConfig, device: DeviceSpec, step: Stepper
) -> tuple[Schedule, str]:
    """The plan to use, and why in one line."""
    if not any(op.splits for op in ops.ops):
        return whole, "overlap: off because no operation can be split along the tokens"
    if config.parts == 1:
        return whole, "overlap: off because parts=1 was asked for"
    if config.parts != "auto":
        plan = _plan(ops, parts=config.parts, config=config, device=device, step=step)
        return plan, f"overlap: parts={config.parts} because it was asked for"
    if device.max_lanes == 1:
        return whole, f"overlap: off because {device.name} runs one kernel at a time"
    plans = [_plan(ops, parts=n, config=config, device=device, step=step) for n in _AUTO_PARTS]
    best = min(plans, key=lambda plan: plan.makespan_us)
    before, after = whole.makespan_us, best.makespan_us
    predicted = f"predicted {after:.0f} us in parts, {before:.0f} us in sequence"
    if after < before:
        return best, f"overlap: on because {predicted}"
    return whole, f"overlap: off because {predicted}"


def _build(
    plan: Schedule,
    unit: Unit,
    kernels: Kernels,
    *,
    config: CompileConfig,
    step: Stepper,
    name: str,
) -> Executable:
    program = step(emit, plan)
    path = step.dump / f"{name}.py" if step.dump else None
    backend = get_backend(_backend_name(config, plan, unit))
    return backend.build(
        program,
        unit=unit,
        kernels=kernels,
        clusters=config.clusters,
        path=path,
        budgets=_budgets(config, plan),
    )


def _backend_name(config: CompileConfig, plan: Schedule, unit: Unit) -> str:
    if config.backend != "auto":
        return config.backend
    has_streams = plan.num_lanes > 1 and device_of(unit).type == "cuda"
    return "streams" if has_streams else "codegen"


def _budgets(config: CompileConfig, plan: Schedule) -> Budgets:
    """What the memory lane takes beside others is the same in all of a plan."""
    shares = [slot.sms for slot in plan.slots if slot.lane == 1 and 0 < slot.sms < plan.num_sms]
    if not shares:
        return Budgets(kind="none", num_sms=plan.num_sms, memory_sms=plan.num_sms)
    return Budgets(kind=config.sm_budgets, num_sms=plan.num_sms, memory_sms=max(shares))


def _tokens_of(captured: CapturedGraph) -> tuple[int, int] | None:
    """Which placeholder, by position, tells the number of tokens, and in which dimension."""
    if not captured.seeds:
        return None
    names = [node.name for node in captured.module.graph.find_nodes(op="placeholder")]
    name, dim = captured.seeds[0]
    return names.index(name), dim


@dataclass(slots=True)
class CompiledGraph:
    """Executables of one graph: the sequence, and the plan in parts if there is one."""

    executables: tuple[Executable, ...]
    binder: InputBinder
    kernels: Kernels
    decision: str
    tokens_at: tuple[int, int] | None = None
    plans: tuple[Schedule, ...] = ()
    """The schedule of each executable; none for a step that was kept by an earlier process."""
    measured: tuple[GemmShape, ...] = ()
    """Weights of which it was measured whether to pack them."""

    def __call__(self, values: Sequence[Any]) -> list[Any]:
        """Outputs for the values of the placeholders; cells of like size."""
        tokens = self.tokens(values)
        executable = self.executable_for(tokens)
        return executable(self.binder(values), even_cuts(tokens, executable.num_cells))

    def tokens(self, values: Sequence[Any]) -> int:
        """Tokens (rows of the split axis) of a call."""
        if self.tokens_at is None:
            return 1
        position, dim = self.tokens_at
        return int(values[position].shape[dim])

    def executable_for(self, tokens: int) -> Executable:
        """Parts, unless there are fewer tokens than cells."""
        planned = self.executables[-1]
        return planned if tokens >= planned.num_cells else self.executables[0]

    def close(self) -> None:
        """Release all executables."""
        for executable in self.executables:
            executable.close()
