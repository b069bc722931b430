"""Green contexts: two sides of one division of a GPU's multiprocessors, each with streams of its own.

What is launched on such a stream runs on its side only, in a captured graph too. The device is divided
once, and both sides are kept: of two divisions, the partitions could overlap. A division lives as long as
the process, since captured graphs refer to it.
"""

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from threading import Lock
from typing import Any

import torch

from nanoflow_compiler.errors import ConfigError

__all__ = ["Division", "Side", "divide"]

_LOCK = Lock()


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """A partition."""

    num_sms: int
    device: torch.device
    context: Any

    def new_stream(self) -> torch.cuda.Stream:
        """What is launched on it runs here."""
        driver = _driver()
        kind = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        stream = _checked(
            driver.cuGreenCtxStreamCreate(self.context, kind, 0), "cuGreenCtxStreamCreate"
        )
        return torch.cuda.ExternalStream(int(stream), device=self.device)


@dataclass(frozen=True, slots=True, eq=False)
class Division:
    """All of a device's multiprocessors, on two sides."""

    group: Side
    rest: Side


def divide(device: torch.device, *, sms: int) -> Division:
    """A group of ``sms`` (rounded up to what the device can part with) and the rest.

    Always the same for the same arguments. Raises :class:`ConfigError` where there are no green contexts.
    """
    with _LOCK:
        return _divide(torch.device("cuda", device.index or 0), sms)


@cache
def _divide(device: torch.device, sms: int) -> Division:
    driver = _driver()
    _wake(device)
    handle = _checked(driver.cuDeviceGet(device.index), "cuDeviceGet")
    kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    whole = _checked(driver.cuDeviceGetDevResource(handle, kind), "cuDeviceGetDevResource")
    total = int(whole.sm.smCount)
    if not 0 < sms < total:
        raise ConfigError(f"memory_sms must be between 1 and {total - 1} on this GPU, not {sms}")
    groups, count, rest = _checked(
        driver.cuDevSmResourceSplitByCount(1, whole, 0, sms), "cuDevSmResourceSplitByCount"
    )
    if count != 1 or not rest.sm.smCount:
        raise ConfigError(f"{total} SMs cannot be divided into {sms} and others; choose fewer")
    return Division(*(_side(part, handle, device) for part in (groups[0], rest)))


def _wake(device: torch.device) -> None:
    """Afterwards there is a primary context, which green contexts are parts of."""
    torch.cuda.init()
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()


def _side(resource: Any, handle: Any, device: torch.device) -> Side:
    driver = _driver()
    described = _checked(
        driver.cuDevResourceGenerateDesc([resource], 1), "cuDevResourceGenerateDesc"
    )
    flag = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    context = _checked(driver.cuGreenCtxCreate(described, handle, flag), "cuGreenCtxCreate")
    return Side(int(resource.sm.smCount), device, context)


def _driver() -> Any:
    try:
        driver = import_module("cuda.bindings.driver")
    except ImportError as error:
        raise ConfigError(
            "green contexts need the package cuda-bindings; install nanoflow-compiler[gpu], or pass "
            'sm_budgets="ctas"'
        ) from error
    if not hasattr(driver, "cuGreenCtxStreamCreate"):
        raise ConfigError("green contexts need cuda-bindings 12.8 or later; upgrade the package")
    return driver


def _checked(answer: tuple[Any, ...], name: str) -> Any:
    """What a call of the driver returns beside its status."""
    status, *values = answer
    if int(status) != 0:
        raise ConfigError(
            f"green contexts are not to be had from this driver: {name} says {status.name}; "
            'use a newer driver, or pass sm_budgets="ctas"'
        )
    return values[0] if len(values) == 1 else values
