"""The engine's loop, one step at a time, which forms a step while the one before it runs."""

from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nanoflow_compiler.engine.batch import Batch
from nanoflow_compiler.engine.batcher import Batcher, Waiting
from nanoflow_compiler.engine.given_logprobs import PromptLogprobs, sampled_logprobs
from nanoflow_compiler.engine.grammars import Grammars
from nanoflow_compiler.engine.limits import RequestLimits
from nanoflow_compiler.engine.messages import (
    NO_TOKEN,
    STEP_TOKEN_BUCKETS,
    EngineRequest,
    EngineStats,
    FinishReason,
    StepOutput,
)
from nanoflow_compiler.engine.runner import ModelRunner
from nanoflow_compiler.engine.sampling_batch import SamplingBatch
from nanoflow_compiler.engine.table import Bools, Ints, RequestTable
from nanoflow_compiler.errors import RequestError

if TYPE_CHECKING:
    from nanoflow_compiler.engine.sampled import Sampled
    from nanoflow_compiler.engine.token_mask import TokenMask

__all__ = ["EngineCore"]


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A step that was submitted."""

    batch: Batch
    sampling: SamplingBatch
    sampled: "Future[Sampled]"
    guided: Ints
    """Rows that a grammar guides."""
    mask: "Future[TokenMask] | None"


class EngineCore:
    """Requests join and leave between steps (continuous batching).

    ``step`` submits step ``i + 1`` before it asks for the tokens of step ``i``: a device with a
    thread of its own never waits for the host. Ends for length are known in advance; an end token is
    seen one step late, and what that step sampled for the request is dropped.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        batcher: Batcher,
        limits: RequestLimits,
        grammars: Grammars,
    ) -> None:
        self.runner = runner
        self.batcher = batcher
        self.table: RequestTable = batcher.table
        self.limits = limits
        self.grammars = grammars
        self._prompt_logprobs = PromptLogprobs()
        self._under_way: _UnderWay | None = None
        self._num_steps = 0
        self._num_batched_tokens = 0
        self._step_tokens = [0] * (len(STEP_TOKEN_BUCKETS) + 1)

    @property
    def has_requests(self) -> bool:
        """Whether another step has anything to do."""
        return bool(self._under_way or self.batcher.has_requests or self.grammars.num_pending)

    def add(self, request: EngineRequest) -> None:
        """Queue a request; RequestError or OutOfBlocksError for one that could never run."""
        waiting = Waiting(request, self.limits.check(request))
        if request.params.structured_outputs is None:
            self.batcher.add(waiting)
        else:
            self.grammars.start(waiting, request.params.structured_outputs)

    def abort(self, keys: Sequence[int]) -> None:
        """Drop requests, wherever they are; what ended already is left alone."""
        self._release(np.flatnonzero(np.isin(self.table.keys, np.array(keys, dtype=np.int64))))
        self.batcher.drop_waiting(set(keys))
        self.grammars.drop(keys)

    def step(self) -> StepOutput | None:
        """Submit the next step, then tell what the one before it found; None if there is no news.

        When a step fails, all requests are dropped: each has keys and values that were not stored.
        """
        before = self._under_way
        try:
            failed = self._admit_compiled()
            self._under_way = self._submit()
            output = self._collect(before) if before else None
            self._guide()
        except BaseException:
            self._reset()
            raise
        if self._under_way is None and before is None:
            self._wait_for_grammars()
        return _with_failed(output, failed)

    def stats(self) -> EngineStats:
        """Counts for people and dashboards."""
        batcher, allocator = self.batcher, self.batcher.allocator
        return EngineStats(
            num_running=len(batcher.running),
            num_waiting=batcher.num_waiting + self.grammars.num_pending,
            num_blocks=allocator.num_usable,
            num_used_blocks=allocator.num_usable - allocator.num_free,
            num_preemptions=batcher.num_preemptions,
            num_cache_queries=batcher.num_cache_queries,
            num_cache_hits=batcher.num_cache_hits,
            num_steps=self._num_steps,
            num_batched_tokens=self._num_batched_tokens,
            step_tokens=tuple(self._step_tokens),
        )

    def close(self) -> None:
        """Wait for the step under way, and release the device; requests that are left never end."""
        self.grammars.close()
        if self._under_way and self._under_way.mask:
            self._under_way.mask.cancel()
        self.runner.close()

    def _admit_compiled(self) -> dict[int, str]:
        """Queue requests whose grammar is ready; why others failed, by key."""
        failed = {}
        for waiting, error in self.grammars.finished():
            if error is None:
                self.batcher.add(waiting)
            else:
                failed[waiting.request.key] = " ".join(str(error).split())
        return failed

    def _wait_for_grammars(self) -> None:
        if self.grammars.num_pending:
            self.grammars.wait()
        else:
            assert not self.batcher.has_requests, "requests wait for nothing"

    def _submit(self) -> _UnderWay | None:
        entries = self.batcher.next_batch()
        if not len(entries):
            return None
        batch = Batch.pack(self.table, entries)
        self._count(batch.num_tokens)
        sampling = self._sampling(batch)
        guided = np.flatnonzero(self.table.has_grammar[batch.slots])
        mask: Future[TokenMask] | None = Future() if len(guided) else None
        sampled = self.runner.submit(batch, sampling, mask=mask)
        return _UnderWay(batch, sampling, sampled, guided, mask)

    def _count(self, num_tokens: int) -> None:
        self._num_steps += 1
        self._num_batched_tokens += num_tokens
        self._step_tokens[bisect_left(STEP_TOKEN_BUCKETS, num_tokens)] += 1

    def _sampling(self, batch: Batch) -> SamplingBatch:
        table = self.table
        return SamplingBatch.gather(
            table.sampling,
            slots=batch.slots,
            num_prompt_tokens=table.num_prompt[batch.slots],
            num_output_tokens=batch.counters,
            block_tables=table.block_tables,
            block_size=table.block_size,
        )

    def _guide(self) -> None:
        """Tell the step under way which tokens grammars allow, now that those before are known."""
        if self._under_way and self._under_way.mask:
            guided = self._under_way.guided
            mask = self.grammars.mask(guided, self._under_way.batch.keys[guided])
            self._under_way.mask.set_result(mask)

    def _collect(self, step: _UnderWay) -> StepOutput:
        batch, table = step.batch, self.table
        sampled = step.sampled.result().received()
        tokens = sampled.tokens.numpy()
        # The others ended, or were aborted, after this step had been submitted.
        alive = table.keys[batch.slots] == batch.keys
        slots, tokens, keys = batch.slots[alive], tokens[alive], batch.keys[alive]
        table.append(slots, tokens)
        self._prompt_logprobs.add(sampled.prompt_logprobs, batch)
        output = StepOutput(
            keys=keys.tolist(),
            tokens=tokens.tolist(),
            logprobs=sampled_logprobs(
                sampled.logprobs, step.sampling, keys=batch.keys, alive=alive
            ),
        )
        for slot in slots[batch.counters[alive] == 0].tolist():
            self._tell_first(slot, output)
        self._end(slots, tokens, output)
        return output

    def _tell_first(self, slot: int, output: StepOutput) -> None:
        """What is told with the first token of a request."""
        table = self.table
        key = int(table.keys[slot])
        output.num_cached_tokens[key] = int(table.num_cached[slot])
        output.times[key] = table.times(slot)
        if table.num_prompt_logprobs[slot] >= 0:
            output.prompt_logprobs[key] = self._prompt_logprobs.take(key)

    def _end(self, slots: Ints, tokens: Ints, output: StepOutput) -> None:
        """Release the requests that ended, and tell why."""
        table = self.table
        is_end = np.isin(tokens, table.eos_token_ids) & ~table.ignores_eos[slots]
        self._see_stop_ids(slots, is_end, output)
        self._follow_grammars(slots, is_end, output)
        is_long = table.num_known[slots] >= table.limit[slots]
        ended = np.flatnonzero(is_end | is_long)
        for at in ended.tolist():
            reason: FinishReason = "stop" if is_end[at] else "length"
            output.finish_reasons.setdefault(output.keys[at], reason)
        gone = slots[ended]
        self.batcher.lengths.add(table.num_known[gone] - table.num_prompt[gone])
        self._release(gone)

    def _see_stop_ids(self, slots: Ints, is_end: Bools, output: StepOutput) -> None:
        for at in np.flatnonzero(self.table.has_stop_ids[slots]).tolist():
            token = output.tokens[at]
            if token in (self.table.request(slots[at]).params.stop_token_ids or ()):
                is_end[at] = True
                output.stop_reasons[output.keys[at]] = token

    def _follow_grammars(self, slots: Ints, is_end: Bools, output: StepOutput) -> None:
        for at in np.flatnonzero(self.table.has_grammar[slots]).tolist():
            key = output.keys[at]
            try:
                is_end[at] |= self.grammars.accept(key, output.tokens[at])
            except RequestError as error:
                is_end[at] = True
                output.errors[key] = str(error)
                output.finish_reasons[key] = "error"

    def _release(self, slots: Ints) -> None:
        if not len(slots):
            return
        keys = self.table.keys[slots].tolist()
        self.batcher.release(slots)
        self.grammars.drop(keys)
        self._prompt_logprobs.drop(keys)

    def _reset(self) -> None:
        if self._under_way and self._under_way.mask:
            self._under_way.mask.cancel()
        self._under_way = None
        self.batcher.reset()
        self.grammars.clear()
        self._prompt_logprobs.clear()


def _with_failed(output: StepOutput | None, failed: dict[int, str]) -> StepOutput | None:
    """Requests that never ran are told with those that did."""
    if not failed:
        return output
    output = output or StepOutput(keys=[], tokens=[])
    for key, message in failed.items():
        output.keys.append(key)
        output.tokens.append(NO_TOKEN)
        output.errors[key] = message
        output.finish_reasons[key] = "error"
    return output
