"""The packed path: one step of many requests as one compiled graph, for the engine."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from nanoflow_compiler.backends.toolchain import prepare_toolchain
from nanoflow_compiler.capture import NUM_GIVEN, capture_step, step_arguments, weights_of
from nanoflow_compiler.compiler import device_of, stepper_for
from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.models.hf import PackedDecoder
from nanoflow_compiler.pipeline import CompiledGraph, compile_graph
from nanoflow_compiler.step_cache import load_step, save_step, step_folder

__all__ = ["PackedStep", "compile_packed"]


class PackedStep:
    """``(input_ids [T], positions [T], rows [R], cuts) -> logits [R, V]``, in the dtype of the model."""

    def __init__(self, compiled: CompiledGraph, weights: Sequence[Tensor]) -> None:
        self.compiled = compiled
        # Here, once, since weights cannot be merged in inference mode.
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
    compiled = load_step(folder) if folder else None
    if compiled is None:
        compiled = _compile(packed, config)
        if folder:
            save_step(folder, compiled)
    return PackedStep(compiled, weights_of(packed))


def _compile(packed: PackedDecoder, config: CompileConfig) -> CompiledGraph:
    if packed.device.type == "cpu" and config.clusters == "inductor":
        prepare_toolchain()
    step = stepper_for(config)
    captured = capture_step(packed)
    device = device_of(config, weights_of(packed))
    with torch.no_grad():
        return compile_graph(captured, config=config, device=device, step=step)
