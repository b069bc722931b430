"""How many requests may be open, and whether new ones are let in."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count

from nanoflow_compiler.server.errors import ApiError

__all__ = ["Admission"]

RETRY_AFTER = {"retry-after": "1"}


class Admission:
    """The bounded queue: everything that is open counts, running in the engine or waiting."""

    def __init__(self, *, max_reqs: int, max_tokens: int | None = None) -> None:
        self.max_reqs = max_reqs
        self.max_tokens = max_tokens
        self.is_draining = False
        self.num_open = 0
        self.num_tokens = 0
        """Of prompts without a first token."""
        self.num_rejected = 0
        self._ids: set[str] = set()
        self._suffixes = count(1)
        self._changed = asyncio.Event()

    @property
    def open_ids(self) -> frozenset[str]:
        """Ids in the engine."""
        return frozenset(self._ids)

    @contextmanager
    def reserve(self, num: int) -> Iterator[None]:
        """Room for so many; 503 if there is none.

        Held while prompts are tokenized, so that a crowd is refused before that work, not after it.
        """
        self._check_room(num)
        self.num_open += num
        try:
            yield
        finally:
            self.num_open -= num
            self._changed.set()

    @contextmanager
    def open(self, wanted: Sequence[str], *, num_each: int = 1) -> Iterator[list[str]]:
        """Lets requests in, and gives each an id that no other open one has; 503 if full."""
        with self.reserve(len(wanted) * num_each):
            ids = [self._take(name) for name in wanted]
            try:
                yield ids
            finally:
                self._ids.difference_update(ids)

    @contextmanager
    def queued_tokens(self, sizes: Sequence[int]) -> Iterator[Callable[[int], None]]:
        """Counts prompts by their index, each until the function is told that it has a first token."""
        waiting = dict(enumerate(sizes))
        self.num_tokens += sum(sizes)

        def begin(index: int) -> None:
            self.num_tokens -= waiting.pop(index, 0)

        try:
            yield begin
        finally:
            self.num_tokens -= sum(waiting.values())

    async def empty(self) -> None:
        """Returns when nothing is open."""
        while self.num_open:
            self._changed.clear()
            await self._changed.wait()

    def _check_room(self, num: int) -> None:
        if self.is_draining:
            raise self._rejected("this server is shutting down; ask another one", "shutting_down")
        if num > self.max_reqs:
            raise ApiError(
                f"{num} completions in one request are more than the {self.max_reqs} that this "
                "server holds: send fewer prompts at a time"
            )
        if self.num_open + num > self.max_reqs:
            message = f"the queue is full ({self.num_open} of {self.max_reqs} are open); try later"
            raise self._rejected(message, "queue_full")
        if self.max_tokens is not None and self.num_tokens >= self.max_tokens:
            message = f"the queue is full (prompts of {self.num_tokens} tokens wait); try later"
            raise self._rejected(message, "queue_full")

    def _rejected(self, message: str, code: str) -> ApiError:
        self.num_rejected += 1
        return ApiError(message, status=503, code=code, headers=RETRY_AFTER)

    def _take(self, wanted: str) -> str:
        """Clients choose request ids, so two may be the same; the engine must see two."""
        name = wanted
        while name in self._ids:
            name = f"{wanted}-{next(self._suffixes)}"
        self._ids.add(name)
        return name
