"""Whole steps as CUDA graphs, one for each bucket: what the host launches is a copy and a replay.

A captured step reads its inputs, and the plans of its attention, from memory that stays where it is;
before a replay the host writes there what the batch needs. Nothing else depends on the batch: rows
that it does not fill are those of requests that nobody made.
"""

import warnings
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor

from nanoflow_compiler.attention_plan import Requests
from nanoflow_compiler.attention_state import AttentionPart, AttentionState, StepLayout
from nanoflow_compiler.engine.batch import Batch
from nanoflow_compiler.engine.buckets import Bucket, Buckets
from nanoflow_compiler.engine.draw import Draw
from nanoflow_compiler.engine.draw_columns import DrawColumns, draw_columns
from nanoflow_compiler.engine.forward import CutFn, Forward
from nanoflow_compiler.engine.sampler import draw_on_gpu
from nanoflow_compiler.engine.sampling_batch import SamplingBatch
from nanoflow_compiler.engine.step_inputs import StepInputs, layout_of, pack_inputs
from nanoflow_compiler.graph_pool import GraphPool, failed_at, reason_of
from nanoflow_compiler.kv_cache import BLOCK_SIZE
from nanoflow_compiler.paged_attention import Plan, PlanKey, Room
from nanoflow_compiler.upload import Array, num_bytes, stage, views

__all__ = ["CapturedStep", "ReadyStep", "StepGraphs"]

Plans = dict[Hashable, object]
"""Of one part, by what attention asks for them with; beside them, what else a part keeps."""


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A graph, and the memory that it reads and writes.

    What it writes is there until another one runs.
    """

    graph: torch.cuda.CUDAGraph
    inputs: StepInputs[Tensor]
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
        self._long: dict[Bucket, CapturedStep] = {}
        """Of long prompts, where another kernel attends them."""
        self._least_long_keys = inf
        """That a row of such prompts sees on average."""
        self._plans: dict[tuple[int, PlanKey, bool, bool], Plan] = {}
        """By part, key, and whether there are (long) prompts; all buckets of a kind share them."""
        self._pool = GraphPool()
        self._is_pinned = forward.cache.device.type == "cuda"
        self._memory = torch.empty(0, dtype=torch.uint8, device=forward.cache.device)

    def capture(self, buckets: Iterable[Bucket]) -> Iterator[Bucket]:
        """Capture them, the largest first, so that the others find memory enough; yields each.

        When one cannot be captured, a warning names the line that failed, and neither it nor a smaller
        one of its kind is: such steps run launched, since a larger graph would take them longer.
        """
        ordered = sorted(buckets, reverse=True)
        self.buckets = Buckets(ordered)
        failed = set()
        for bucket in ordered:
            if bucket.has_prompts in failed:
                continue
            try:
                self._captured[bucket] = self._capture(bucket)
            except Exception as error:
                warnings.warn(_refusal(bucket, error), stacklevel=2)
                failed.add(bucket.has_prompts)
            else:
                if bucket.has_prompts and bucket.num_tokens == ordered[0].num_tokens:
                    self._capture_long(bucket)
                yield bucket

    def ready(self, batch: Batch, sampling: SamplingBatch) -> ReadyStep | None:
        """The captured step for a batch and its inputs; None if there is none."""
        bucket = self.buckets.find(batch)
        if bucket is None or bucket not in self._captured:
            return None
        step = self._captured[bucket]
        layout, inputs = self._inputs(bucket, batch)
        cuts = self._cuts(bucket)
        parts = self.forward.parts(layout, cuts=cuts, slots=step.inputs.kv_slots)
        requests = [Requests.of(part) for part in parts]
        if any(part.are_long(self._least_long_keys) for part in requests):
            step = self._long.get(bucket, step)
        plans = [
            pair
            for part, captured in zip(requests, step.parts, strict=True)
            for pair in _plan_inputs(part, captured.plans.values())
        ]
        columns = draw_columns(sampling, step.logits.shape[-1]).padded(bucket.num_rows)
        fixed = (*inputs.arrays, *columns.arrays)
        staged = stage([*fixed, *(array for _, array in plans)], is_pinned=self._is_pinned)
        arrays = views(staged.memory, staged.forms)[len(fixed) :]
        return ReadyStep(
            step=step,
            inputs=staged.memory[: num_bytes(staged.forms[: len(fixed)])],
            plans=tuple((there, here) for (there, _), here in zip(plans, arrays, strict=True)),
        )

    def run(self, ready: ReadyStep) -> Tensor:
        """Logits of all rows of the bucket, until the next call.

        Nothing is copied to memory that a step before still reads: all that is launched is in order.
        """
        self._memory[: len(ready.inputs)].copy_(ready.inputs, non_blocking=True)
        for there, here in ready.plans:
            there[: len(here)].copy_(here, non_blocking=True)
        ready.step.graph.replay()
        return ready.step.logits

    def close(self) -> None:
        """Release the graphs."""
        self.buckets = Buckets(())
        self._captured.clear()
        self._long.clear()
        self._plans.clear()

    def _inputs(self, bucket: Bucket, batch: Batch) -> tuple[StepLayout, StepInputs[Any]]:
        filled = bucket.fill(batch, spare_slot=self.forward.spare_slot)
        layout = layout_of(filled)
        return layout, pack_inputs(filled, layout, needs_rows=True)

    def _cuts(self, bucket: Bucket) -> Sequence[int]:
        return self._cut(bucket.num_tokens, self.forward.step.num_cells)

    def _capture_long(self, bucket: Bucket) -> None:
        """Only for the largest size, which chunks of long prompts fill."""
        keys = {key for part in self._captured[bucket].parts for key in part.plans}
        found = [key.least_long_keys for key in keys if isinstance(key, PlanKey)]
        least = min((keys for keys in found if keys is not None), default=inf)
        if least == inf:
            return
        try:
            self._long[bucket] = self._capture(bucket, is_long=True)
        except Exception as error:
            message = "the kernel of long prompts is not captured, and not used"
            warnings.warn(f"{message}: {reason_of(error)}", stacklevel=3)
        else:
            self._least_long_keys = least

    def _capture(self, bucket: Bucket, *, is_long: bool = False) -> CapturedStep:
        layout, arrays = self._inputs(bucket, bucket.example())
        inputs, draw = self._place(arrays, DrawColumns.none().padded(bucket.num_rows))
        parts = self.forward.parts(layout, cuts=self._cuts(bucket), slots=inputs.kv_slots)
        # Compiles most kernels, and plans what has no room yet.
        self._run(bucket, inputs, draw, parts)
        placed = tuple(
            replace(part, plans=self._with_room(at, part.plans, bucket=bucket, is_long=is_long))
            for at, part in enumerate(parts)
        )
        for part in placed:
            for there, array in _plan_inputs(Requests.of(part), part.plans.values()):
                there[: len(array)].copy_(torch.from_numpy(array))
        launch = partial(self._run, bucket, inputs, draw, placed)
        if is_long:
            launch()  # what is not ours is loaded when it first runs
        graph, (logits, tokens) = self._pool.capture(launch)
        return CapturedStep(graph, inputs, placed, logits, tokens)

    @torch.inference_mode()
    def _run(
        self,
        bucket: Bucket,
        inputs: StepInputs[Tensor],
        draw: Draw,
        parts: tuple[AttentionPart, ...],
    ) -> tuple[Tensor, Tensor]:
        forward = self.forward
        state = AttentionState(forward.cache, parts)
        logits = forward(inputs, state=state, cuts=self._cuts(bucket))
        tokens = draw_on_gpu(logits, draw)
        forward.last_tokens[inputs.slots] = tokens
        return logits, tokens

    def _place(
        self, inputs: StepInputs[Any], columns: DrawColumns
    ) -> tuple[StepInputs[Tensor], Draw]:
        """All buckets have their inputs at the beginning of the same memory."""
        num_inputs = len(inputs.arrays)
        staged = stage([*inputs.arrays, *columns.arrays], is_pinned=self._is_pinned)
        if len(self._memory) < len(staged.memory):
            assert not self._captured, "the largest bucket is captured first"
            self._memory = torch.empty_like(staged.memory, device=self._memory.device)
        self._memory[: len(staged.memory)].copy_(staged.memory)
        placed = views(self._memory, staged.forms)
        return StepInputs.of(placed[:num_inputs]), Draw(*placed[num_inputs:])

    def _with_room(self, part: int, plans: Plans, *, bucket: Bucket, is_long: bool) -> Plans:
        """The plans of a part with room for any batch of the bucket, and of all smaller buckets."""
        placed: Plans = {}
        for key in plans:
            if isinstance(key, PlanKey):
                at = (part, key, bucket.has_prompts, is_long)
                if at not in self._plans:
                    self._plans[at] = key.with_room(self._room(bucket, is_long=is_long))
                placed[key] = self._plans[at]
        return placed

    def _room(self, bucket: Bucket, *, is_long: bool) -> Room:
        return Room(
            num_tokens=bucket.num_tokens,
            num_requests=self.forward.spare_slot,
            num_blocks=self._max_blocks,
            has_prompts=bucket.has_prompts,
            is_long=is_long,
        )


def _plan_inputs(requests: Requests, plans: Iterable[object]) -> Iterator[tuple[Tensor, Array]]:
    """Where the plans for these requests go on the device, and their arrays."""
    for plan in plans:
        if isinstance(plan, Plan):
            yield from plan.inputs(requests)


def _refusal(bucket: Bucket, error: Exception) -> str:
    kind = "steps with prompts" if bucket.has_prompts else "decode steps"
    return (
        f"{kind} of up to {bucket.num_tokens} tokens are not captured as CUDA graphs, and run launched "
        f"one operation at a time: {reason_of(error)}{failed_at(error)}"
    )
