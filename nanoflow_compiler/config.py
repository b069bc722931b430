"""Frozen settings of the compiler, and the only reader of the variables of this package."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, get_args

from nanoflow_compiler.errors import ConfigError
from nanoflow_compiler.hardware import DEVICE_SPECS

__all__ = [
    "BackendName",
    "ClusterMode",
    "CompileConfig",
    "GemmMode",
    "KernelMode",
    "SmBudgets",
    "TrainingMode",
    "cache_dir",
]

BackendName = Literal["auto", "codegen", "streams", "cuda_graph", "reference"]
ClusterMode = Literal["inductor", "eager"]
GemmMode = Literal["auto", "aten", "packed", "measure"]
KernelMode = Literal["auto", "own", "aten"]
SmBudgets = Literal["green", "ctas", "none"]
TrainingMode = Literal["inductor", "eager"]

MAX_PARTS = 16
MAX_LANES = 8
MAX_SMS = 1024


def cache_dir() -> Path:
    """Where models and compiled programs are kept between runs.

    ``NANOFLOW_CACHE`` if set, else ``nanoflow`` under ``XDG_CACHE_HOME`` (``~/.cache``).
    """
    if chosen := os.environ.get("NANOFLOW_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "nanoflow"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileConfig:
    """What ``torch.compile(model, backend="nanoflow", options={...})`` understands.

    Raises :class:`ConfigError` on construction when a value cannot be used.
    """

    parts: int | Literal["auto"] = "auto"
    """Nano-batches that each splittable operation is cut into; ``"auto"`` asks the estimate."""
    backend: BackendName = "auto"
    """``codegen`` runs generated Python, ``streams`` its lanes on streams of a GPU, ``cuda_graph`` captures
    that for each kind of call, ``reference`` interprets the program and checks it; ``auto`` is ``streams``
    for a plan of several lanes on a GPU, and else ``codegen``."""
    device: str = "auto"
    """Name of the :class:`DeviceSpec` to plan for; ``"auto"`` is the device of the inputs."""
    lanes: int | Literal["auto"] = "auto"
    """Lanes (concurrent streams) of the schedule; ``"auto"`` is what the device gains from."""
    sm_budgets: SmBudgets = "green"
    """What keeps lanes to their share of a GPU: green contexts, the numbers of thread blocks of our own
    kernels (``ctas``), or nothing."""
    memory_sms: int | Literal["auto"] = "auto"
    """SMs of the memory lane beside others; ``"auto"`` is what about saturates memory (40 of an H200's)."""
    clusters: ClusterMode = "inductor"
    """How pointwise clusters run: compiled by Inductor, or as plain ATen calls."""
    gemms: GemmMode = "auto"
    """How GEMMs run on a CPU: by ``aten``, by oneDNN on ``packed`` copies of the weights, or ``auto``:
    as measured faster on this machine, and none packed where the copies would not fit into memory.
    ``measure`` is ``auto``, and on a GPU times each shape that the tables of kernels do not have."""
    kernels: KernelMode = "auto"
    """Operators that stand for several nodes: where our kernels serve the device and are faster
    (``auto``), wherever they fit, also without a kernel (``own``), or nowhere (``aten``)."""
    fuse: bool = True
    """Merge linears that share an input into one GEMM."""
    training: TrainingMode = "inductor"
    """Who compiles a graph that needs gradients, which this compiler does not split."""
    cache: bool = True
    """Keep the compiled step of a model that is loaded by name, so that the next start is warm."""
    dump: str | Path | None = None
    """Directory that receives the numbered text of every step and the generated source."""

    def __post_init__(self) -> None:
        """Refuse values that no later step could use."""
        _check_count("parts", self.parts, most=MAX_PARTS)
        _check_count("lanes", self.lanes, most=MAX_LANES)
        _check_count("memory_sms", self.memory_sms, most=MAX_SMS)
        _check_choice("sm_budgets", self.sm_budgets, get_args(SmBudgets))
        _check_choice("backend", self.backend, get_args(BackendName))
        _check_choice("clusters", self.clusters, get_args(ClusterMode))
        _check_choice("gemms", self.gemms, get_args(GemmMode))
        _check_choice("kernels", self.kernels, get_args(KernelMode))
        _check_choice("training", self.training, get_args(TrainingMode))
        _check_choice("device", self.device, ("auto", *DEVICE_SPECS))
        for name in ("fuse", "cache"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.dump is not None and not isinstance(self.dump, str | Path):
            raise ConfigError(f"dump must be a directory path, not {self.dump!r}")

    @classmethod
    def from_options(cls, options: Mapping[str, object] | None) -> "CompileConfig":
        """Build from a user's mapping; an unknown key is an error that lists the known ones."""
        if options is not None and not isinstance(options, Mapping):
            raise ConfigError(f"options must be a mapping of names to values, not {options!r}")
        known = [field.name for field in fields(cls)]
        for key in options or {}:
            if key not in known:
                near = get_close_matches(str(key), known, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ConfigError(f"unknown option {key!r}{hint}; known: {', '.join(known)}")
        return cls(**dict(options or {}))  # type: ignore[arg-type]  # checked in __post_init__


def _check_count(name: str, value: object, *, most: int) -> None:
    if value == "auto":
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"{name} must be 'auto' or an integer from 1 to {most}, not {value!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
