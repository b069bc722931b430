"""How many requests may be open, and whether new ones are let in."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count

from nanoflow_compiler.server.errors import ApiError

__all__ = ["Admission"]

RETRY_AFTER = {"retry-after": "1"}


class Admission:
    """The bounded queue: everything that is open counts, running in the engine or waiting."""

    def __init__(self, *, max_open: int) -> None:
        self.max_open = max_open
        self.is_draining = False
        self.num_open = 0
        self.num_rejected = 0
        self._ids: set[str] = set()
        self._suffixes = count(1)
        self._changed = asyncio.Event()

    @property
    def open_ids(self) -> frozenset[str]:
        """Ids in the engine."""
        return frozenset(self._ids)

    @contextmanager
    def open(self, wanted: Sequence[str], *, num_each: int = 1) -> Iterator[list[str]]:
        """Lets requests in, and gives each an id that no other open one has; 503 if full."""
        num = len(wanted) * num_each
        self.check_room(num)
        ids = [self._take(name) for name in wanted]
        self.num_open += num
        try:
            yield ids
        finally:
            self.num_open -= num
            self._ids.difference_update(ids)
            self._changed.set()

    async def empty(self) -> None:
        """Returns when nothing is open."""
        while self.num_open:
            self._changed.clear()
            await self._changed.wait()

    def check_room(self, num: int) -> None:
        """503 if there is none now; before the work of tokenization, nothing is held yet."""
        if self.is_draining:
            raise self._rejected("this server is shutting down; ask another one", "shutting_down")
        if num > self.max_open:
            raise ApiError(
                f"{num} completions in one request are more than the {self.max_open} that this "
                "server holds: send fewer prompts at a time"
            )
        if self.num_open + num > self.max_open:
            message = f"the queue is full ({self.num_open} of {self.max_open} are open); try later"
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
