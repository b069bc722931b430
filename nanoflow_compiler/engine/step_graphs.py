"""Whole steps as CUDA graphs, one for each bucket: what the host launches is a copy and a replay.

A captured step reads its inputs, and the plans of its attention, from memory that stays where it is;
before a replay the host writes there what the batch needs. Nothing else depends on the batch: rows
that it does not fill are those of requests that nobody made.
"""

import traceback
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanoflow_compiler.attention_plan import Requests
from nanoflow_compiler.attention_state import AttentionPart, AttentionState, StepLayout
from nanoflow_compiler.engine.batch import Batch
from nanoflow_compiler.engine.buckets import Bucket, Buckets
from nanoflow_compiler.engine.draw import Draw
from nanoflow_compiler.engine.draw_columns import DrawColumns, draw_columns
from nanoflow_compiler.engine.forward import Forward
from nanoflow_compiler.engine.sampler import draw_on_gpu
from nanoflow_compiler.engine.sampling_batch import SamplingBatch
from nanoflow_compiler.engine.step_inputs import StepInputs, layout_of, pack_inputs
from nanoflow_compiler.kv_cache import BLOCK_SIZE
from nanoflow_compiler.paged_attention import Plan, PlanKey, Room
from nanoflow_compiler.upload import Array, num_bytes, stage, views

__all__ = ["CapturedStep", "ReadyStep", "StepGraphs"]

CutFn = Callable[[int, int], Sequence[int]]
Plans = dict[Hashable, object]
"""Of one part, by what attention asks for them with; beside them, what else a part keeps."""


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A graph, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: StepInputs[Tensor]
    draw: Draw
    parts: tuple[AttentionPart, ...]
    logits: Tensor
    tokens: Tensor
    """Drawn from the logits."""


@dataclass(frozen=True, slots=True)
class ReadyStep:
    """What a captured step is to be given, in memory that the device copies from."""

    step: CapturedStep
    inputs: Tensor
    """Bytes, for the memory of all inputs."""
    plans: tuple[tuple[Tensor, Tensor], ...]
    """Where, and what."""


class StepGraphs:
    """The captured steps of a model."""

    def __init__(self, forward: Forward, *, cut: CutFn, max_model_len: int) -> None:
        self.forward = forward
        self.buckets = Buckets(())
        self._cut = cut
        self._max_blocks = -(-max_model_len // BLOCK_SIZE)
        self._captured: dict[Bucket, CapturedStep] = {}
        self._plans: dict[tuple[int, PlanKey, bool], Plan] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._memory = torch.empty(0, dtype=torch.uint8, device=forward.cache.device)

    def capture(self, buckets: Iterable[Bucket]) -> Iterator[Bucket]:
        """Capture them, the largest first, so that the others find memory enough; yields each.

        One that cannot be captured is left out, with a warning that names the line that failed.
        """
        for bucket in sorted(buckets, reverse=True):
            try:
                self._captured[bucket] = self._capture(bucket)
            except Exception as error:
                warnings.warn(_refusal(bucket, error), stacklevel=2)
                break
            yield bucket
        self.buckets = Buckets(self._captured)

    def ready(self, batch: Batch, sampling: SamplingBatch) -> ReadyStep | None:
        """The captured step for a batch and its inputs; None if there is none."""
        bucket = self.buckets.find(batch)
        if bucket is None:
            return None
        step = self._captured[bucket]
        layout, inputs = self._inputs(bucket, batch)
        parts = self._parts(bucket, layout, slots=step.inputs.kv_slots)
        plans = [
            pair
            for part, captured in zip(parts, step.parts, strict=True)
            for pair in _plan_inputs(Requests.of(part), captured.plans.values())
        ]
        columns = draw_columns(sampling, step.logits.shape[-1]).padded(bucket.num_rows)
        fixed = (*inputs.arrays, *columns.arrays)
        staged = stage([*fixed, *(array for _, array in plans)], is_pinned=True)
        arrays = views(staged.memory, staged.forms)[len(fixed) :]
        return ReadyStep(
            step=step,
            inputs=staged.memory[: num_bytes(staged.forms[: len(fixed)])],
            plans=tuple((there, here) for (there, _), here in zip(plans, arrays, strict=True)),
        )

    def run(self, ready: ReadyStep) -> Tensor:
        """Logits of all rows of the bucket, until the next call."""
        self._memory[: len(ready.inputs)].copy_(ready.inputs, non_blocking=True)
        for there, here in ready.plans:
            there[: len(here)].copy_(here, non_blocking=True)
        ready.step.graph.replay()
        return ready.step.logits

    def close(self) -> None:
        """Release the graphs."""
        self.buckets = Buckets(())
        self._captured.clear()
        self._plans.clear()

    def _inputs(self, bucket: Bucket, batch: Batch) -> tuple[StepLayout, StepInputs[Any]]:
        filled = bucket.fill(batch, spare_slot=self.forward.spare_slot)
        layout = layout_of(filled)
        return layout, pack_inputs(filled, layout, needs_rows=True)

    def _parts(
        self, bucket: Bucket, layout: StepLayout, *, slots: Tensor
    ) -> tuple[AttentionPart, ...]:
        step = self.forward.step
        cuts = self._cut(bucket.num_tokens, step.num_cells)
        return tuple(
            layout.part(cuts[first], cuts[last], slots=slots)
            for first, last in step.attention_parts
        )

    def _capture(self, bucket: Bucket) -> CapturedStep:
        layout, arrays = self._inputs(bucket, bucket.example())
        inputs, draw = self._place(arrays, DrawColumns.none().padded(bucket.num_rows))
        parts = self._parts(bucket, layout, slots=inputs.kv_slots)
        self._run(bucket, inputs, draw, parts)  # compiles, and plans what has no room yet
        placed = tuple(
            replace(part, plans=self._with_room(at, part.plans, bucket=bucket))
            for at, part in enumerate(parts)
        )
        for part in placed:
            for there, array in _plan_inputs(Requests.of(part), part.plans.values()):
                there[: len(array)].copy_(torch.from_numpy(array))
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits, tokens = self._run(bucket, inputs, draw, placed)
        return CapturedStep(graph, inputs, draw, placed, _unowned(logits), _unowned(tokens))

    @torch.inference_mode()
    def _run(
        self,
        bucket: Bucket,
        inputs: StepInputs[Tensor],
        draw: Draw,
        parts: tuple[AttentionPart, ...],
    ) -> tuple[Tensor, Tensor]:
        forward = self.forward
        cuts = self._cut(bucket.num_tokens, forward.step.num_cells)
        logits = forward(inputs, state=AttentionState(forward.cache, parts), cuts=cuts)
        tokens = draw_on_gpu(logits, draw)
        forward.last_tokens[inputs.slots] = tokens
        return logits, tokens

    def _place(
        self, inputs: StepInputs[Any], columns: DrawColumns
    ) -> tuple[StepInputs[Tensor], Draw]:
        """All buckets have their inputs at the beginning of the same memory."""
        num_inputs = len(inputs.arrays)
        staged = stage([*inputs.arrays, *columns.arrays], is_pinned=True)
        if len(self._memory) < len(staged.memory):
            assert not self._captured, "the largest bucket is captured first"
            self._memory = torch.empty_like(staged.memory, device=self._memory.device)
        self._memory[: len(staged.memory)].copy_(staged.memory)
        placed = views(self._memory, staged.forms)
        return StepInputs.of(placed[:num_inputs]), Draw(*placed[num_inputs:])

    def _with_room(self, part: int, plans: Plans, *, bucket: Bucket) -> Plans:
        """The plans of a part with room for any batch of the bucket, and of all smaller buckets."""
        placed: Plans = {}
        for key in plans:
            if isinstance(key, PlanKey):
                at = (part, key, bucket.has_prompts)
                if at not in self._plans:
                    self._plans[at] = key.with_room(self._room(bucket))
                placed[key] = self._plans[at]
        return placed

    def _room(self, bucket: Bucket) -> Room:
        return Room(
            num_tokens=bucket.num_tokens,
            num_requests=self.forward.spare_slot,
            num_blocks=self._max_blocks,
            has_prompts=bucket.has_prompts,
        )


class _Memory:
    """Of a tensor, as other libraries are told of it."""

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": f"<i{tensor.itemsize}",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def _unowned(tensor: Tensor) -> Tensor:
    """The tensor without a claim to its memory, which the graphs of other buckets may use again.

    It is read before any of them is replayed.
    """
    return torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype)


def _plan_inputs(requests: Requests, plans: Iterable[object]) -> Iterator[tuple[Tensor, Array]]:
    """Where the plans for these requests go on the device, and their arrays."""
    for plan in plans:
        if isinstance(plan, Plan):
            yield from plan.inputs(requests)


def _refusal(bucket: Bucket, error: Exception) -> str:
    lines = [frame.line for frame in traceback.extract_tb(error.__traceback__) if _is_ours(frame)]
    where = f" at `{lines[-1]}`" if lines else ""
    reason = str(error).strip().partition("\n")[0]
    return (
        f"steps of {bucket.num_tokens} tokens are not captured as CUDA graphs, and run launched one "
        f"operation at a time: {reason}{where}"
    )


def _is_ours(frame: traceback.FrameSummary) -> bool:
    """Of a generated program, where each line is an operation."""
    return frame.filename.startswith("<nanoflow") or frame.name == "run"
