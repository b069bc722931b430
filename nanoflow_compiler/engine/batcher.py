"""Forms the batches: which requests advance in the next step, and by how many tokens."""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from nanoflow_compiler.engine.blocks import BlockAllocator, block_hashes
from nanoflow_compiler.engine.lengths import OutputLengths, peak_tokens
from nanoflow_compiler.engine.messages import EngineRequest
from nanoflow_compiler.engine.table import RequestTable

__all__ = ["Batcher", "Entries", "Waiting"]

_LOG = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
_NONE: Ints = np.zeros(0, dtype=np.int64)
_QUIET_SECONDS = 10.0
"""Preemptions are logged together, not more often than this."""


@dataclass(frozen=True, slots=True)
class Entries:
    """Consecutive tokens of ``R`` requests, which one step computes."""

    slots: Ints  # [R]
    starts: Ints  # [R], the number of the first token
    counts: Ints  # [R]
    is_sampled: Bools  # [R], whether these are all tokens, so that the next one is found

    def __len__(self) -> int:
        return len(self.slots)

    @classmethod
    def join(cls, parts: Sequence["Entries"]) -> "Entries":
        """All of them in one."""
        return cls(
            slots=np.concatenate([part.slots for part in parts]),
            starts=np.concatenate([part.starts for part in parts]),
            counts=np.concatenate([part.counts for part in parts]),
            is_sampled=np.concatenate([part.is_sampled for part in parts]),
        )


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that has no slot yet."""

    request: EngineRequest
    limit: int
    """Tokens at which it ends for its length, prompt included."""
    arrived_s: float = field(default_factory=time.monotonic)


class Batcher:
    """A constant token budget per step: decode first, then prefill cut at any token to fill it.

    A request is admitted when the cache has room for the tokens it has, and the most that all running
    requests are expected to hold at once fits too. When that guess was too low, decode runs out of
    blocks: the youngest running request gives its blocks back, keeps its place in the queue, and is
    computed again later. Requests are admitted in order of arrival.
    """

    def __init__(
        self, table: RequestTable, allocator: BlockAllocator, *, max_num_batched_tokens: int
    ) -> None:
        self.table = table
        self.allocator = allocator
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Waiting] = deque()
        self.queued: deque[int] = deque()
        """Slots without blocks, the oldest request first: preempted ones, and who is next in line."""
        self.running: Ints = _NONE
        """Slots in the order of admission."""
        self.lengths = OutputLengths()
        self.num_preemptions = 0
        self.num_cache_queries = 0
        self.num_cache_hits = 0
        self._num_silent = 0
        self._last_log = 0.0

    @property
    def has_requests(self) -> bool:
        return bool(self.waiting or self.queued or len(self.running))

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + len(self.queued)

    def add(self, waiting: Waiting) -> None:
        """Queue a request that was checked, and that fits if it is alone."""
        self.waiting.append(waiting)

    def drop_waiting(self, keys: AbstractSet[int]) -> None:
        """Forget requests that have no slot yet."""
        if any(waiting.request.key in keys for waiting in self.waiting):
            self.waiting = deque(w for w in self.waiting if w.request.key not in keys)

    def next_batch(self) -> Entries:
        """The tokens of the next step, which count as computed from now on."""
        before = self.num_preemptions
        budget = self.max_num_batched_tokens
        slots = self._decodes()
        parts = [self._advance(slots, np.ones_like(slots))]
        slots = self._prefills()
        parts.append(self._advance(slots, _fill(self._pending(slots), budget - len(parts[0]))))
        # What was just taken from a running request is not given to a new one.
        if self.num_preemptions == before:
            parts += self._admit(budget - sum(int(part.counts.sum()) for part in parts))
        return Entries.join(parts)

    def release(self, slots: Ints) -> None:
        """Forget requests that have slots, wherever they are, and take their blocks back."""
        is_gone = np.zeros(self.table.num_slots, dtype=np.bool_)
        is_gone[slots] = True
        self.name_blocks(slots)
        self.running = self.running[~is_gone[self.running]]
        self.queued = deque(slot for slot in self.queued if not is_gone[slot])
        for slot in slots.tolist():
            self.allocator.release(self.table.take_blocks(slot))
            self.table.remove(slot)

    def reset(self) -> None:
        """Drop all requests, and all that is cached: a step failed, and what it stored is not known."""
        self.waiting.clear()
        for slot in [*self.queued, *self.running.tolist()]:
            self.allocator.release(self.table.take_blocks(slot))
            self.table.remove(slot)
        self.queued.clear()
        self.running = _NONE
        self.allocator.forget_names()

    def name_blocks(self, slots: Ints) -> None:
        """Let others find the blocks that are full of computed tokens with known values."""
        table, size = self.table, self.allocator.block_size
        starts = table.num_named[slots]
        ends = np.minimum(table.num_computed[slots], table.num_known[slots]) // size
        changed = np.stack([slots, starts, ends], axis=1)[starts < ends]
        for slot, start, end in changed.tolist():
            blocks = table.block_tables[slot, start:end].tolist()
            for block, name in zip(blocks, self._names(slot)[start:end], strict=True):
                self.allocator.name(block, name)
        table.num_named[slots] = ends

    def _pending(self, slots: Ints) -> Ints:
        pending: Ints = self.table.num_scheduled[slots] - self.table.num_computed[slots]
        return pending

    def _advance(self, slots: Ints, counts: Ints) -> Entries:
        """The entries of those that have a count above zero."""
        table = self.table
        slots, counts = slots[counts > 0], counts[counts > 0]
        starts = table.num_computed[slots]
        table.num_computed[slots] += counts
        is_sampled = table.num_computed[slots] == table.num_scheduled[slots]
        table.num_scheduled[slots] += is_sampled
        # Blocks of an answer are named when it ends: before, nobody can ask for what follows them.
        is_prompt = starts < table.num_prompt[slots]
        if is_prompt.any():
            self.name_blocks(slots[is_prompt])
        return Entries(slots, starts, counts, is_sampled)

    def _decodes(self) -> Ints:
        """Slots of one pending token, each with a block for it."""
        pending = self._pending(self.running)
        # A request that will have all its tokens when the running step ends computes no more.
        unfinished = self.table.num_scheduled[self.running] < self.table.limit[self.running]
        slots: Ints = self.running[(pending == 1) & unfinished]
        if len(slots) > self.max_num_batched_tokens:
            slots = slots[: self.max_num_batched_tokens]
            self.running = np.roll(self.running, -self.max_num_batched_tokens)
        table = self.table
        while True:
            position = table.num_computed[slots]
            short = slots[position >= table.num_blocks[slots] * table.block_size]
            if len(short) <= self.allocator.num_free:
                break
            preempted = self._preempt_youngest()
            slots = slots[slots != preempted]
        for slot, block in zip(short.tolist(), self.allocator.allocate(len(short)), strict=True):
            table.give_blocks(slot, [block])
        return slots

    def _prefills(self) -> Ints:
        """Slots of prompts that were begun."""
        begun: Ints = self.running[self._pending(self.running) > 1]
        return begun

    def _admit(self, budget: int) -> Iterator[Entries]:
        """Requests that were in line, until the budget is full.

        One after the other, so that the next can share the blocks that the last one will fill in
        this very step: a step stores all keys and values of a layer before any later row reads.
        """
        while budget > 0 and (slot := self._admit_next()) is not None:
            self.running = np.append(self.running, slot)
            slots = np.array([slot])
            entries = self._advance(slots, _fill(self._pending(slots), budget))
            budget -= int(entries.counts[0])
            yield entries

    def _admit_next(self) -> int | None:
        """The next request in line, with all blocks that its tokens need."""
        if not self.queued and self.waiting and self.table.num_free:
            waiting = self.waiting.popleft()
            slot = self.table.insert(
                waiting.request, limit=waiting.limit, arrived_s=waiting.arrived_s
            )
            self.queued.append(slot)
        if not self.queued or not self._give_first_blocks(self.queued[0]):
            return None
        return self.queued.popleft()

    def _give_first_blocks(self, slot: int) -> bool:
        table, allocator = self.table, self.allocator
        num_tokens = int(table.num_known[slot])
        assert num_tokens == table.num_scheduled[slot], "a token of this request is under way"
        # One token at least is computed, since its row is what the next token is sampled from.
        most = (num_tokens - 1) // allocator.block_size
        if table.num_prompt_logprobs[slot] >= 0:
            most = 0  # every row of the prompt is needed
        shared = allocator.find(self._names(slot)[:most])
        missing = allocator.count(num_tokens) - len(shared)
        if missing > allocator.num_free_beside(shared):
            return False
        num_used = len(shared) - (allocator.num_free - allocator.num_free_beside(shared))
        if len(self.running) and not self._is_expected_to_fit(slot, num_shared=num_used):
            return False
        allocator.share(shared)
        table.give_blocks(slot, [*shared, *allocator.allocate(missing)])
        table.num_computed[slot] = len(shared) * allocator.block_size
        table.num_named[slot] = len(shared)
        if table.num_cached[slot] < 0:
            table.num_cached[slot] = table.num_computed[slot]
            table.admitted_s[slot] = time.monotonic()
        self.num_cache_queries += num_tokens
        self.num_cache_hits += len(shared) * allocator.block_size
        return True

    def _is_expected_to_fit(self, slot: int, *, num_shared: int) -> bool:
        """Whether the peak of all running requests and this one is expected to fit.

        ``num_shared`` are blocks that it shares with running ones.
        """
        table = self.table
        slots = np.append(self.running, slot)
        longest = -(-(table.limit[slots] - 1) // self.allocator.block_size)
        if longest.sum() <= self.allocator.num_usable:
            return True  # nothing needs to be guessed
        generated = table.num_known[slots] - table.num_prompt[slots]
        most = table.limit[slots] - table.num_prompt[slots]
        remaining = self.lengths.expected(generated, most=most) - generated
        peak = peak_tokens(
            table.num_known[slots],
            np.maximum(remaining, 0),
            block_size=self.allocator.block_size,
        )
        # A block that several share is counted for each of them.
        num_used = self.allocator.num_usable - self.allocator.num_free
        repeated = int(table.num_blocks[self.running].sum()) + num_shared - num_used
        return peak <= (self.allocator.num_usable + repeated) * self.allocator.block_size

    def _names(self, slot: int) -> list[bytes]:
        """Names of all full blocks of known tokens."""
        table = self.table
        size, names = self.allocator.block_size, table.block_names[slot]
        tokens = table.token_ids[slot, len(names) * size : table.num_known[slot]]
        if len(tokens) >= size:
            before = names[-1] if names else self._salt(slot)
            names += block_hashes(tokens, block_size=size, before=before)
        return names

    def _salt(self, slot: int) -> bytes:
        """Without a prefix cache only the completions of one prompt share blocks."""
        if self.allocator.keep_unused:
            return b""
        return self.table.request(slot).group.to_bytes(8, "little")

    def _preempt_youngest(self) -> int:
        youngest = int(self.running[np.argmax(self.table.keys[self.running])])
        self.running = self.running[self.running != youngest]
        self.name_blocks(np.array([youngest]))
        self.allocator.release(self.table.take_blocks(youngest))
        self.queued.appendleft(youngest)
        self.num_preemptions += 1
        self._num_silent += 1
        self._log_preemptions()
        return youngest

    def _log_preemptions(self) -> None:
        now = time.monotonic()
        if now - self._last_log < _QUIET_SECONDS:
            return
        _LOG.warning(
            "the KV cache was full: %d of %d running requests lost their blocks and are computed "
            "again. Raise num_kv_blocks (or kv_cache_memory_bytes), or lower max_num_seqs.",
            self._num_silent,
            len(self.running) + len(self.queued),
        )
        self._last_log, self._num_silent = now, 0


def _fill(pending: Ints, budget: int) -> Ints:
    """As many of each as fit, in order."""
    ends = np.minimum(np.cumsum(pending), max(budget, 0))
    return np.diff(ends, prepend=0)
