"""Keeps Python's collector away from what is there before a measurement begins."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["frozen_garbage"]


@contextmanager
def frozen_garbage() -> Iterator[None]:
    """Within, the collector looks at new objects only: one look at all takes tens of milliseconds."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
