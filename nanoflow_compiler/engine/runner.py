"""Runs batches on the device: inputs, the compiled step, the sampler. Submitted now, asked for later."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from nanoflow_compiler.attention_state import AttentionState
from nanoflow_compiler.engine.batch import Batch
from nanoflow_compiler.engine.buckets import Bucket
from nanoflow_compiler.engine.device_times import DeviceTimes
from nanoflow_compiler.engine.forward import CutFn, EagerStep, Forward, StepFn
from nanoflow_compiler.engine.logprobs import prompt_logprobs
from nanoflow_compiler.engine.sampled import Sampled
from nanoflow_compiler.engine.sampler import sample
from nanoflow_compiler.engine.sampling_batch import SamplingBatch
from nanoflow_compiler.engine.step_graphs import StepGraphs
from nanoflow_compiler.engine.step_inputs import StepInputs, layout_of, pack_inputs
from nanoflow_compiler.engine.token_mask import TokenMask
from nanoflow_compiler.kv_cache import KVCache
from nanoflow_compiler.upload import upload

__all__ = ["CutFn", "EagerStep", "ModelRunner", "PreparedStep", "StepFn", "even_cuts"]


def even_cuts(num_tokens: int, num_cells: int) -> list[int]:
    """Cells that differ by at most one token."""
    return [num_tokens * cell // num_cells for cell in range(num_cells + 1)]


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """A step that needs nothing more of the host but what the step before it samples."""

    run: Callable[[], Tensor]
    """Logits of all rows of ``inputs``."""
    inputs: StepInputs[Tensor]
    num_sampled: int
    num_prompt_logprobs: int
    sampling: SamplingBatch
    drawn: Tensor | None = None
    """The tokens, where they are chosen in ``run``."""


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
        self.forward = Forward(step, cache=cache, num_slots=num_slots)
        self.cache = cache
        self.cut = cut
        self.graphs: StepGraphs | None = None
        self.times = DeviceTimes() if cache.device.type == "cuda" else None
        threaded = cache.device.type != "cpu" if is_threaded is None else is_threaded
        self._worker = _worker(cache.device) if threaded else None

    def capture(self, buckets: Iterable[Bucket], *, max_model_len: int) -> Iterator[Bucket]:
        """Capture steps of these sizes as CUDA graphs, before the first batch; yields each."""
        self.graphs = StepGraphs(self.forward, cut=self.cut, max_model_len=max_model_len)
        return self.graphs.capture(buckets)

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
        if self.graphs is not None:
            self.graphs.close()
        self.forward.close()

    def _prepare(self, batch: Batch, sampling: SamplingBatch) -> PreparedStep:
        ready = self.graphs.ready(batch, sampling) if self.graphs else None
        if self.graphs is None or ready is None:
            run, inputs = self._launched(batch)
            return _prepared(run, inputs, batch, sampling)
        step = ready.step
        return _prepared(
            partial(self.graphs.run, ready), step.inputs, batch, sampling, drawn=step.tokens
        )

    def _launched(self, batch: Batch) -> tuple[Callable[[], Tensor], StepInputs[Tensor]]:
        device = self.cache.device
        layout = layout_of(batch)
        arrays = pack_inputs(batch, layout, needs_rows=device.type != "cpu")
        inputs = StepInputs.of(upload(arrays.arrays, device=device))
        cuts = tuple(self.cut(batch.num_tokens, self.forward.step.num_cells))
        parts = self.forward.parts(layout, cuts=cuts, slots=inputs.kv_slots)
        state = AttentionState(self.cache, parts)
        return partial(self.forward, inputs, state=state, cuts=cuts), inputs

    def _run(self, prepared: PreparedStep, mask: "Future[TokenMask] | None") -> Sampled:
        with self.times.step() if self.times else nullcontext():
            logits = prepared.run()
            return self._choose(logits, prepared, mask.result() if mask else None)

    def _run_here(
        self, prepared: PreparedStep, mask: "Future[TokenMask] | None"
    ) -> "Future[Sampled]":
        """The caller makes the mask after this returns, so that sampling is left to who makes it."""
        sampled: Future[Sampled] = Future()
        logits = prepared.run()

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
    def _choose(self, logits: Tensor, prepared: PreparedStep, mask: TokenMask | None) -> Sampled:
        num, forward, inputs = prepared.num_sampled, self.forward, prepared.inputs
        drawn = None if prepared.drawn is None else prepared.drawn[:num]
        sampled = sample(
            logits[:num],
            prepared.sampling,
            token_store=forward.token_store,
            mask=mask,
            drawn=drawn,
        )
        if sampled.tokens is not drawn:
            forward.last_tokens[inputs.slots[:num]] = sampled.tokens
        if len(inputs.targets):
            found = prompt_logprobs(logits[num:], inputs.targets, num=prepared.num_prompt_logprobs)
            sampled = replace(sampled, prompt_logprobs=found)
        return sampled.sent()


def _worker(device: torch.device) -> ThreadPoolExecutor:
    """A thread whose kernels run on the device, whichever that is of the machine's."""
    name = "nanoflow-device"
    if device.type != "cuda":
        return ThreadPoolExecutor(1, thread_name_prefix=name)
    return ThreadPoolExecutor(
        1, thread_name_prefix=name, initializer=torch.cuda.set_device, initargs=(device,)
    )


def _prepared(
    run: Callable[[], Tensor],
    inputs: StepInputs[Tensor],
    batch: Batch,
    sampling: SamplingBatch,
    *,
    drawn: Tensor | None = None,
) -> PreparedStep:
    return PreparedStep(
        run=run,
        inputs=inputs,
        num_sampled=len(batch.slots),
        num_prompt_logprobs=int(batch.prompt_counts.max(initial=0)),
        sampling=sampling,
        drawn=drawn,
    )
