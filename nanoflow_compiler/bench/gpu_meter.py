"""What a GPU takes while something runs on it: energy, power and clock, by NVML."""

import threading
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from statistics import fmean
from time import perf_counter
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from nanoflow_compiler.errors import ConfigError

__all__ = ["EnergyMeter", "GpuMeter", "GpuUse", "Watch", "has_meter"]

INTERVAL_S = 0.1
"""Between two readings of the clock, which NVML itself updates about as often."""


class EnergyMeter(Protocol):
    """What a watch reads."""

    def energy_j(self) -> float:
        """Joules of the whole card, since some time in the past."""

    def sm_mhz(self) -> float:
        """The clock of the multiprocessors, now."""


def has_meter() -> bool:
    """Whether there is a GPU, and the package that reads it."""
    return torch.cuda.is_available() and find_spec("pynvml") is not None


class GpuMeter:
    """NVML's readings of one device of torch, by default the current one."""

    def __init__(self, device: torch.device | None = None) -> None:
        if find_spec("pynvml") is None:
            raise ConfigError("nvidia-ml-py is missing; install nanoflow-compiler[gpu]")
        self._nvml: Any = import_module("pynvml")
        self._nvml.nvmlInit()
        properties = torch.cuda.get_device_properties(device or torch.cuda.current_device())
        # NVML counts all cards of the machine, torch those that it was shown.
        self._device = self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")

    def energy_j(self) -> float:
        """Since the driver was loaded."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)) / 1e3

    def sm_mhz(self) -> float:
        """Now."""
        return float(self._nvml.nvmlDeviceGetClockInfo(self._device, self._nvml.NVML_CLOCK_SM))


@dataclass(frozen=True, slots=True)
class GpuUse:
    """Of a stretch of time."""

    seconds: float
    joules: float
    mean_sm_mhz: float

    @property
    def watts(self) -> float:
        """The mean power."""
        return self.joules / self.seconds

    def results(self, *, num_tokens: int) -> dict[str, float]:
        """As JSON has it, of so many tokens."""
        return {
            "joules_per_1000_tokens": self.joules / num_tokens * 1e3,
            "mean_power_watts": self.watts,
            "mean_sm_clock_mhz": self.mean_sm_mhz,
            "energy_joules": self.joules,
        }


@dataclass(slots=True, eq=False)
class Watch:
    """A context: what the GPU took in it is in ``use`` afterwards. A thread reads the clock."""

    meter: EnergyMeter
    interval_s: float = INTERVAL_S
    use: GpuUse | None = None
    _clocks: list[float] = field(default_factory=list)
    _is_over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _start_s: float = 0.0
    _start_j: float = 0.0

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._read, name="nanoflow-meter", daemon=True)
        self._start_j, self._start_s = self.meter.energy_j(), perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        seconds, joules = perf_counter() - self._start_s, self.meter.energy_j() - self._start_j
        self._is_over.set()
        assert self._thread is not None
        self._thread.join()
        self.use = GpuUse(seconds=seconds, joules=joules, mean_sm_mhz=fmean(self._clocks))

    def _read(self) -> None:
        while True:
            self._clocks.append(self.meter.sm_mhz())
            if self._is_over.wait(self.interval_s):
                return
