"""Runs batches on the device: inputs, the compiled step, the sampler. Submitted now, asked for later."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nanoflow_compiler.attention_state import AttentionState, StepLayout, attention_state
from nanoflow_compiler.engine.batch import Batch, Ints
from nanoflow_compiler.engine.logprobs import prompt_logprobs
from nanoflow_compiler.engine.sampler import Sampled, sample
from nanoflow_compiler.engine.sampling_batch import SamplingBatch
from nanoflow_compiler.engine.token_mask import TokenMask
from nanoflow_compiler.kv_cache import BLOCK_SIZE, KVCache
from nanoflow_compiler.upload import upload

__all__ = ["CutFn", "EagerStep", "ModelRunner", "PreparedStep", "StepFn", "even_cuts"]

CutFn = Callable[[int, int], Sequence[int]]
"""Number of tokens and of cells to the cells' offsets: 0, ..., number of tokens."""


class StepFn(Protocol):
    """A model step, whole or as a program over cells: token ranges whose offsets are given per call."""

    @property
    def attention_parts(self) -> Sequence[tuple[int, int]]:
        """The cells ``first`` up to ``last`` (exclusive) that each attention part covers; part 0 is all."""

    @property
    def num_cells(self) -> int:
        """How many cells there are."""

    def __call__(
        self, input_ids: Tensor, positions: Tensor, rows: Tensor, cuts: Sequence[int]
    ) -> Tensor:
        """Float32 logits ``[len(rows), V]``; cell ``i`` is the tokens ``cuts[i]`` up to ``cuts[i + 1]``."""

    def close(self) -> None:
        """Release what the step holds; it is not called again."""


class EagerStep:
    """A model called as it is: one cell, and nothing to cut."""

    attention_parts = ((0, 1),)
    num_cells = 1

    def __init__(self, model: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.model = model

    def __call__(
        self, input_ids: Tensor, positions: Tensor, rows: Tensor, cuts: Sequence[int]
    ) -> Tensor:
        del cuts
        return self.model(input_ids, positions, rows)

    def close(self) -> None:
        del self.model


def even_cuts(num_tokens: int, num_cells: int) -> list[int]:
    """Cells that differ by at most one token."""
    return [num_tokens * cell // num_cells for cell in range(num_cells + 1)]


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """Everything that a step needs on the device but what the step before it samples."""

    input_ids: Tensor
    unknown: Tensor
    unknown_slots: Tensor
    positions: Tensor
    rows: Tensor
    """Of which logits are computed: those that are sampled, then those of prompts, then any."""
    slots: Tensor
    prompt_targets: Tensor
    num_prompt_logprobs: int
    cuts: tuple[int, ...]
    state: AttentionState
    sampling: SamplingBatch


class ModelRunner:
    """The device: steps run in the order in which they were submitted, one after the other.

    ``submit`` returns at once. The token that a request sampled last stays on the device, by slot,
    where the next step reads it: nobody has to wait for it in between.
    """

    def __init__(
        self,
        step: StepFn,
        *,
        cache: KVCache,
        num_slots: int,
        cut: CutFn = even_cuts,
        is_threaded: bool | None = None,
    ) -> None:
        """``is_threaded``: steps run in a thread of their own; by default not on a CPU.

        There every thread that computes has a team of OpenMP threads, and as soon as the teams
        outnumber the cores libgomp no longer spins at barriers: decode took three times as long.
        """
        self.step = step
        self.cache = cache
        self.cut = cut
        self.last_tokens = torch.zeros(num_slots, dtype=torch.int64, device=cache.device)
        self.token_store = torch.zeros(
            cache.num_blocks * BLOCK_SIZE, dtype=torch.int64, device=cache.device
        )
        """The token behind each stored key and value: what penalties look back at."""
        threaded = cache.device.type != "cpu" if is_threaded is None else is_threaded
        self._worker = (
            ThreadPoolExecutor(1, thread_name_prefix="nanoflow-device") if threaded else None
        )

    def submit(
        self,
        batch: Batch,
        sampling: SamplingBatch,
        *,
        mask: "Future[TokenMask] | None" = None,
    ) -> "Future[Sampled]":
        """What the batch samples, when it has; rows of logits are those of ``batch.rows``.

        Only sampling waits for ``mask``, which may depend on what the step before this one samples.
        """
        prepared = self._prepare(batch, sampling)
        if self._worker is not None:
            return self._worker.submit(self._run, prepared, mask)
        return self._run_here(prepared, mask)

    def close(self) -> None:
        """Wait for what was submitted, and release the step."""
        if self._worker is not None:
            self._worker.shutdown()
        self.step.close()

    def _prepare(self, batch: Batch, sampling: SamplingBatch) -> PreparedStep:
        cuts = tuple(self.cut(batch.num_tokens, self.step.num_cells))
        layout = StepLayout.pack(
            query_lens=batch.query_lens,
            context_lens=batch.context_lens,
            block_tables=batch.block_tables,
        )
        parts = tuple(
            layout.part(cuts[first], cuts[last], device=self.cache.device)
            for first, last in self.step.attention_parts
        )
        arrays = (
            batch.token_ids,
            batch.unknown,
            batch.unknown_slots,
            batch.positions,
            self._rows(batch),
            batch.slots,
            batch.prompt_targets,
        )
        ids, unknown, unknown_slots, positions, rows, slots, targets = upload(
            arrays, device=self.cache.device
        )
        return PreparedStep(
            input_ids=ids,
            unknown=unknown,
            unknown_slots=unknown_slots,
            positions=positions,
            rows=rows,
            slots=slots,
            prompt_targets=targets,
            num_prompt_logprobs=int(batch.prompt_counts.max(initial=0)),
            cuts=cuts,
            state=AttentionState(self.cache, parts),
            sampling=sampling,
        )

    def _rows(self, batch: Batch) -> Ints:
        """Never none on a GPU, where a kernel cannot be launched for nothing."""
        rows = np.concatenate([batch.rows, batch.prompt_rows])
        if len(rows) or self.cache.device.type == "cpu":
            return rows
        return np.zeros(1, dtype=np.int64)

    def _run(self, prepared: PreparedStep, mask: "Future[TokenMask] | None") -> Sampled:
        logits = self._forward(prepared)
        return self._choose(logits, prepared, mask.result() if mask else None)

    def _run_here(
        self, prepared: PreparedStep, mask: "Future[TokenMask] | None"
    ) -> "Future[Sampled]":
        """The caller makes the mask after this returns, so that sampling is left to who makes it."""
        sampled: Future[Sampled] = Future()
        logits = self._forward(prepared)

        def choose(known: "Future[TokenMask]") -> None:
            try:
                sampled.set_result(self._choose(logits, prepared, known.result()))
            except Exception as error:  # whoever asks for the result gets it
                sampled.set_exception(error)

        if mask is None:
            sampled.set_result(self._choose(logits, prepared, None))
        else:
            mask.add_done_callback(choose)
        return sampled

    @torch.inference_mode()
    def _forward(self, prepared: PreparedStep) -> Tensor:
        """Logits of all rows."""
        ids = prepared.input_ids
        ids[prepared.unknown] = self.last_tokens[prepared.unknown_slots]
        self.token_store[prepared.state.parts[0].slots] = ids
        with attention_state(prepared.state):
            return self.step(ids, prepared.positions, prepared.rows, prepared.cuts)

    @torch.inference_mode()
    def _choose(self, logits: Tensor, prepared: PreparedStep, mask: TokenMask | None) -> Sampled:
        num_sampled = len(prepared.slots)
        sampled = sample(
            logits[:num_sampled], prepared.sampling, token_store=self.token_store, mask=mask
        )
        self.last_tokens[prepared.slots] = sampled.tokens
        if not len(prepared.prompt_targets):
            return sampled
        found = prompt_logprobs(
            logits[num_sampled:], prepared.prompt_targets, num=prepared.num_prompt_logprobs
        )
        return replace(sampled, prompt_logprobs=found)
