"""How many multiprocessors the kernels that are launched now may use.

A program that runs lanes side by side sets it for each launch; kernels of ours that choose their own
number of thread blocks read it. It limits nothing by itself: a partition of the GPU does that.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

__all__ = ["beside_others", "budget", "current_sms", "is_alone", "set_budget", "sm_budget"]

_BUDGET: ContextVar[int | None] = ContextVar("nanoflow_sm_budget", default=None)
_IS_ALONE: ContextVar[bool] = ContextVar("nanoflow_is_alone", default=True)


def current_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU for what is launched in this thread or task now: all, if none were set.

    1 of a CPU, where kernels are compiled or interpreted.
    """
    if device.type == "cpu":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    limit = _BUDGET.get()
    return count if limit is None else max(1, min(limit, count))


def budget() -> int | None:
    """What was set; None stands for the whole device."""
    return _BUDGET.get()


def set_budget(sms: int | None) -> None:
    """From now on, in this thread or task."""
    _BUDGET.set(sms)


@contextmanager
def sm_budget(sms: int | None) -> Iterator[None]:
    """A budget for a block of code; afterwards that from before, whatever the block set."""
    token = _BUDGET.set(sms)
    try:
        yield
    finally:
        _BUDGET.reset(token)


def is_alone() -> bool:
    """Whether all kernels go to one stream: then one may begin while the one before it still runs."""
    return _IS_ALONE.get()


@contextmanager
def beside_others() -> Iterator[None]:
    """For a block of code that launches on several streams, which wait for each other."""
    token = _IS_ALONE.set(False)
    try:
        yield
    finally:
        _IS_ALONE.reset(token)
