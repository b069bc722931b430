"""Forms the batches: which requests advance in the next step, and by how many tokens."""

import warnings
from collections import deque
from dataclasses import dataclass

from nanoflow_compiler.engine.blocks import BlockAllocator
from nanoflow_compiler.engine.request import FinishReason, Request
from nanoflow_compiler.errors import OutOfBlocksError

__all__ = ["Batcher", "Entry"]


@dataclass(frozen=True, slots=True)
class Entry:
    """Consecutive tokens of one request, from its token ``start``."""

    request: Request
    start: int
    num_tokens: int

    @property
    def is_sampled(self) -> bool:
        """Whether the step computes the last token that is known, and so finds the next one."""
        return self.start + self.num_tokens == len(self.request.token_ids)


class Batcher:
    """A constant token budget per step: decode first, then prefill cut at any token to fill it.

    A request is admitted once the cache has room for all tokens it has, so prefill never runs short;
    decode may, and then the youngest running request gives its blocks back and is computed again later.
    Requests are admitted in order of arrival, and a preempted one keeps its place.
    """

    def __init__(
        self, allocator: BlockAllocator, *, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self.allocator = allocator
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0

    @property
    def has_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def check(self, request: Request) -> None:
        """Refuse a request that could not be finished even alone in the cache."""
        needed = self.allocator.count(request.max_stored_tokens)
        if needed > self.allocator.num_usable:
            raise OutOfBlocksError(
                f"a prompt of {len(request.prompt_token_ids)} tokens and {request.max_tokens} more "
                f"need {needed} KV blocks of {self.allocator.block_size} tokens, and there are "
                f"{self.allocator.num_usable}: raise num_kv_blocks (or kv_cache_memory_bytes), or "
                "lower max_tokens"
            )

    def add(self, request: Request) -> None:
        self.check(request)
        self.waiting.append(request)

    def next_batch(self) -> tuple[Entry, ...]:
        """The tokens of the next step, which count as computed from now on; empty if nothing runs."""
        preemptions = self.num_preemptions
        entries = self._decode()
        budget = self.max_num_batched_tokens - len(entries)
        entries += self._prefill(budget, but=entries)
        if self.num_preemptions == preemptions:
            budget = self.max_num_batched_tokens - sum(entry.num_tokens for entry in entries)
            entries += self._admit(budget)
        for entry in entries:
            entry.request.num_computed += entry.num_tokens
        return tuple(entries)

    def finish(self, request: Request, *, reason: FinishReason) -> None:
        """End a request, wherever it is, and take its blocks back."""
        assert request.finish_reason is None, f"request {request.request_id} ended twice"
        request.finish_reason = reason
        (self.running if request in self.running else self.waiting).remove(request)
        self._release(request)

    def _decode(self) -> list[Entry]:
        entries: list[Entry] = []
        decodes = [request for request in self.running if request.num_pending == 1]
        for request in decodes[: self.max_num_batched_tokens]:
            while request in self.running and not self._grow(request):
                self._preempt_youngest()
            if request in self.running:
                entries.append(Entry(request, request.num_computed, 1))
        return entries

    def _prefill(self, budget: int, *, but: list[Entry]) -> list[Entry]:
        taken = {entry.request.request_id for entry in but}
        entries = []
        for request in self.running:
            num_tokens = min(request.num_pending, budget)
            if num_tokens and request.request_id not in taken:
                entries.append(Entry(request, request.num_computed, num_tokens))
                budget -= num_tokens
        return entries

    def _admit(self, budget: int) -> list[Entry]:
        entries = []
        while budget and self.waiting and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            needed = self.allocator.count(len(request.token_ids))
            if needed > self.allocator.num_free:
                break
            request.blocks = self.allocator.allocate(needed)
            self.running.append(self.waiting.popleft())
            num_tokens = min(request.num_pending, budget)
            entries.append(Entry(request, 0, num_tokens))
            budget -= num_tokens
        return entries

    def _grow(self, request: Request) -> bool:
        """Whether the request has, or now got, the block that its next token goes to."""
        missing = self.allocator.count(request.num_computed + 1) - len(request.blocks)
        if missing > self.allocator.num_free:
            return False
        request.blocks += self.allocator.allocate(max(missing, 0))
        return True

    def _preempt_youngest(self) -> None:
        # Running requests are in order of arrival and decode serves them in that order, so the last
        # one is in no entry yet.
        request = self.running.pop()
        self._release(request)
        request.num_computed = 0
        self.waiting.appendleft(request)
        self.num_preemptions += 1
        warnings.warn(
            "the KV cache is full: a request lost its blocks and is computed again. Raise "
            "num_kv_blocks (or kv_cache_memory_bytes), or lower max_num_seqs.",
            RuntimeWarning,
            stacklevel=2,
        )

    def _release(self, request: Request) -> None:
        self.allocator.free(request.blocks)
        request.blocks = []
