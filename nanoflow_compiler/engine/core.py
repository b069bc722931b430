"""The engine's loop, one step at a time; the device is always one step ahead of what is known."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nanoflow_compiler.engine.batch import Batch
from nanoflow_compiler.engine.batcher import Batcher
from nanoflow_compiler.engine.messages import (
    EngineRequest,
    EngineStats,
    FinishReason,
    StepOutput,
    TokenLogprobs,
)
from nanoflow_compiler.engine.runner import ModelRunner
from nanoflow_compiler.engine.sampler import Sampled
from nanoflow_compiler.engine.sampling_batch import SamplingBatch
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.engine.table import EMPTY, Ints, RequestTable
from nanoflow_compiler.errors import (
    ConfigError,
    EmptyPromptError,
    PromptTooLongError,
    RequestError,
)

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = ["EngineCore"]


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A step that was submitted."""

    batch: Batch
    sampling: SamplingBatch
    sampled: "Future[Sampled]"


class EngineCore:
    """Requests join and leave between steps (continuous batching).

    ``step`` submits step ``i + 1`` before it asks for the tokens of step ``i``, so the device never
    waits for the host. Ends for length are known in advance; an end token is seen one step late, and
    what that step sampled for the request is dropped.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        batcher: Batcher,
        max_model_len: int,
        vocab_size: int,
    ) -> None:
        self.runner = runner
        self.batcher = batcher
        self.table: RequestTable = batcher.table
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self._under_way: _UnderWay | None = None
        self._num_steps = 0

    @property
    def has_requests(self) -> bool:
        """Whether another step has anything to do."""
        return self._under_way is not None or self.batcher.has_requests

    def add(self, request: EngineRequest) -> None:
        """Queue a request that :meth:`check` lets pass."""
        self.batcher.add(request, limit=self.check(request))

    def check(self, request: EngineRequest) -> int:
        """The tokens at which the request ends for its length, its prompt included.

        One that could never run is refused with a :class:`RequestError` or :class:`OutOfBlocksError`.
        """
        num_prompt = _checked(request.prompt_token_ids, vocab_size=self.vocab_size)
        request.params.check_vocabulary(self.vocab_size)
        _check_offered(request.params)
        room = self.max_model_len - num_prompt
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {num_prompt} tokens, and max_model_len={self.max_model_len} "
                "must hold it and at least one more: shorten the prompt or raise max_model_len"
            )
        most = request.params.max_tokens
        limit = num_prompt + (room if most is None else min(room, most))
        self.batcher.check(num_prompt=num_prompt, limit=limit)
        return limit

    def abort(self, keys: Sequence[int]) -> None:
        """Drop requests, wherever they are; what ended already is left alone."""
        slots = np.flatnonzero(np.isin(self.table.keys, np.array(keys, dtype=np.int64)))
        for slot in slots.tolist():
            self.batcher.release(slot)
        self.batcher.drop_waiting(set(keys))

    def step(self) -> StepOutput | None:
        """Submit the next step, then tell what the one before it found; None if there was none.

        When a step fails, all requests are dropped: each has keys and values that were not stored.
        """
        before = self._under_way
        try:
            self._under_way = self._submit()
            if before is None:
                assert self._under_way or not self.batcher.has_requests, "requests wait for nothing"
                return None
            return self._collect(before)
        except BaseException:
            self._under_way = None
            self.batcher.reset()
            raise

    def stats(self) -> EngineStats:
        """Counts for people and dashboards."""
        batcher, allocator = self.batcher, self.batcher.allocator
        return EngineStats(
            num_running=len(batcher.running),
            num_waiting=batcher.num_waiting,
            num_blocks=allocator.num_usable,
            num_used_blocks=allocator.num_usable - allocator.num_free,
            num_preemptions=batcher.num_preemptions,
            num_cache_queries=batcher.num_cache_queries,
            num_cache_hits=batcher.num_cache_hits,
            num_steps=self._num_steps,
        )

    def close(self) -> None:
        """Drop all requests, and release the device."""
        self.runner.close()

    def _submit(self) -> _UnderWay | None:
        entries = self.batcher.next_batch()
        if not len(entries):
            return None
        self._num_steps += 1
        batch = Batch.pack(self.table, entries)
        sampling = self._sampling(batch)
        return _UnderWay(batch, sampling, self.runner.submit(batch, sampling))

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

    def _collect(self, step: _UnderWay) -> StepOutput:
        batch, table = step.batch, self.table
        sampled = step.sampled.result()
        tokens = sampled.tokens.cpu().numpy()
        # The others ended, or were aborted, after this step had been submitted.
        alive = table.keys[batch.slots] == batch.keys
        slots, tokens = batch.slots[alive], tokens[alive]
        table.append(slots, tokens)
        keys = batch.keys[alive]
        logprobs = _logprobs(sampled, step.sampling, keys=np.where(alive, batch.keys, EMPTY))
        is_first = batch.counters[alive] == 0
        reasons, stop_reasons = self._ends(slots, tokens)
        return StepOutput(
            keys=keys.tolist(),
            tokens=tokens.tolist(),
            finish_reasons=reasons,
            stop_reasons=stop_reasons,
            logprobs=logprobs,
            num_cached_tokens=dict(
                zip(
                    keys[is_first].tolist(), table.num_cached[slots[is_first]].tolist(), strict=True
                )
            ),
        )

    def _ends(self, slots: Ints, tokens: Ints) -> tuple[dict[int, FinishReason], dict[int, int]]:
        """Release the requests that ended, and say why, by key."""
        table = self.table
        is_end = np.isin(tokens, table.eos_token_ids) & ~table.ignores_eos[slots]
        stop_reasons: dict[int, int] = {}
        for at in np.flatnonzero(table.has_stop_ids[slots]).tolist():
            token, slot = int(tokens[at]), int(slots[at])
            if token in (table.request(slot).params.stop_token_ids or ()):
                is_end[at] = True
                stop_reasons[int(table.keys[slot])] = token
        is_long = table.num_known[slots] >= table.limit[slots]
        ended = np.flatnonzero(is_end | is_long)
        reasons: dict[int, FinishReason] = {
            int(table.keys[slots[at]]): "stop" if is_end[at] else "length" for at in ended.tolist()
        }
        gone = slots[ended]
        self.batcher.lengths.add(table.num_known[gone] - table.num_prompt[gone])
        for slot in gone.tolist():
            self.batcher.release(slot)
        return reasons, stop_reasons


_PLAIN = SamplingParams()
_NOT_OFFERED = ("prompt_logprobs", "structured_outputs")


def _check_offered(params: SamplingParams) -> None:
    for name in _NOT_OFFERED:
        value = getattr(params, name)
        if value != getattr(_PLAIN, name):
            raise ConfigError(
                f"{name}={value!r:.80}: the engine does not offer this yet; leave it out"
            )


def _checked(token_ids: Sequence[int], *, vocab_size: int) -> int:
    """The number of tokens; one that the model has no embedding for would end the whole step."""
    ids = np.asarray(token_ids)
    if not ids.size:
        raise EmptyPromptError("the prompt has no tokens, so there is nothing to continue")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise RequestError("prompt_token_ids must be a list of integers")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise RequestError(
            f"prompt_token_ids holds {low if low < 0 else high}, but the model's tokens are 0 to "
            f"{vocab_size - 1}; use the model's own tokenizer"
        )
    return len(ids)


def _logprobs(sampled: Sampled, sampling: SamplingBatch, *, keys: Ints) -> dict[int, TokenLogprobs]:
    """Of the rows that ask for them and still have a key."""
    rows = np.flatnonzero((sampling.num_logprobs >= 0) & (keys != EMPTY)).tolist()
    if sampled.logprobs is None or not rows:
        return {}
    ids, values, ranks = (
        tensor.cpu().numpy()
        for tensor in (
            sampled.logprobs.token_ids,
            sampled.logprobs.logprobs,
            sampled.logprobs.ranks,
        )
    )
    counts = sampling.num_logprobs + 1
    return {
        int(keys[row]): TokenLogprobs(
            ids[row, : counts[row]].tolist(), values[row, : counts[row]].tolist(), int(ranks[row])
        )
        for row in rows
    }
