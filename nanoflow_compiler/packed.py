"""The packed path: one step of many requests as one compiled graph, for the engine."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from nanoflow_compiler.backends.toolchain import prepare_toolchain
from nanoflow_compiler.capture import NUM_GIVEN, capture_step, step_arguments, weights_of
from nanoflow_compiler.compiler import device_of, stepper_for
from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.kernel_warmup import KernelWarmup
from nanoflow_compiler.models.hf import PackedDecoder
from nanoflow_compiler.pipeline import CompiledGraph, compile_graph
from nanoflow_compiler.stages import Stages
from nanoflow_compiler.step_cache import load_step, save_step, step_folder

__all__ = ["PackedStep", "compile_packed"]


class PackedStep:
    """``(input_ids [T], positions [T], rows [R], cuts) -> logits [R, V]``, in the dtype of the model."""

    def __init__(
        self, compiled: CompiledGraph, weights: Sequence[Tensor], *, stages: Stages | None = None
    ) -> None:
        self.compiled = compiled
        self.seconds = Stages() if stages is None else stages
        """What took how long to come here."""
        # Here, once, since weights cannot be merged in inference mode.
        with self.seconds.stage("bind"):
            compiled.binder.bind([*[None] * NUM_GIVEN, *weights])
        # The rest is merged and packed, so that the originals may go with the model.
        live = {position for _, position in compiled.binder.layout.live}
        self._live = [w if at in live else None for at, w in enumerate(weights, NUM_GIVEN)]
        planned = compiled.executables[-1]
        self.num_cells = planned.num_cells
        self.attention_parts = planned.attention_parts
        self.source = planned.source

    def __call__(
        self, input_ids: Tensor, positions: Tensor, rows: Tensor, cuts: Sequence[int]
    ) -> Tensor:
        """Run one step; with an empty cell the unsplit program runs instead."""
        given = step_arguments(input_ids, positions, rows)
        inputs = self.compiled.binder.fill([*given, *self._live])
        if any(start == end for start, end in itertools.pairwise(cuts)):
            whole = (0, input_ids.shape[0])
            (logits,) = self.compiled.executables[0](inputs, whole)
        else:
            (logits,) = self.compiled.executables[-1](inputs, tuple(cuts))
        result: Tensor = logits
        return result

    def close(self) -> None:
        """Release the programs."""
        self.compiled.close()


def compile_packed(packed: PackedDecoder, config: CompileConfig, *, keep: bool) -> PackedStep:
    """The compiled step of a decoder; raises :class:`UnsupportedGraphError` if it breaks.

    ``keep`` says that the modules are as their class and configuration say, so that a step kept
    by an earlier process is the same one; options ``cache`` and ``dump`` may still forbid it.
    """
    folder = step_folder(packed, config) if keep and config.cache and not config.dump else None
    stages = Stages()
    with stages.stage("cache"):
        compiled = load_step(folder) if folder else None
    if compiled is None:
        compiled = _compile_beside_kernels(packed, config, stages=stages)
        if folder:
            with stages.stage("cache"):
                save_step(folder, compiled)
    return PackedStep(compiled, weights_of(packed), stages=stages)


def _compile_beside_kernels(
    packed: PackedDecoder, config: CompileConfig, *, stages: Stages
) -> CompiledGraph:
    """Our kernels, which a step kept by an earlier process has in Triton's cache, are compiled meanwhile."""
    warmup = KernelWarmup.start(packed)
    if warmup is None:
        return _compile(packed, config, stages=stages)
    try:
        compiled = _compile(packed, config, stages=stages)
    except BaseException:
        warmup.close()
        raise
    with stages.stage("kernels"):
        warmup.wait()
    return compiled


def _compile(packed: PackedDecoder, config: CompileConfig, *, stages: Stages) -> CompiledGraph:
    if packed.device.type == "cpu" and config.clusters == "inductor":
        prepare_toolchain()
    step = stepper_for(config)
    with stages.stage("trace"):
        captured = capture_step(packed)
    device = device_of(config, weights_of(packed))
    with torch.no_grad(), stages.stage("clusters"):
        compiled = compile_graph(captured, config=config, device=device, step=step)
    stages.move(sum(time.seconds for time in step.times), of="clusters", to="passes")
    return compiled
