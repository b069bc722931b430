"""Seconds of long work by stage."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Stages"]


class Stages(dict[str, float]):
    """Seconds by name, in the order in which stages began."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What runs inside counts for ``name``, also when it fails."""
        start = time.perf_counter()
        self.setdefault(name, 0.0)
        try:
            yield
        finally:
            self[name] += time.perf_counter() - start

    def move(self, seconds: float, *, of: str, to: str) -> None:
        """Part of a stage is a stage of its own."""
        self[of] -= seconds
        self[to] = self.get(to, 0.0) + seconds
