"""Where a model runs: what the setting ``device`` names."""

import re
from contextlib import AbstractContextManager, nullcontext

import torch

from nanoflow_compiler.errors import ConfigError

__all__ = ["check_device", "current_device", "find_device"]

SETTING = re.compile(r"auto|cpu|cuda(:\d+)?")


def check_device(device: str) -> None:
    """Refuse what names no device; whether this machine has it is seen when the model is loaded."""
    if not SETTING.fullmatch(device):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {device!r}")


def find_device(device: str | torch.device) -> torch.device:
    """A device of this machine, with its number; ``auto`` is the CPU where torch has no CUDA device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is unknown; use auto, cpu, cuda or cuda:N") from error
    return _numbered(place) if place.type == "cuda" else place


def current_device(place: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one of this thread: Triton launches there, wherever its tensors are."""
    return torch.cuda.device(place) if place.type == "cuda" else nullcontext()


def _numbered(place: torch.device) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ConfigError(
            f"device={str(place)!r}: torch sees no CUDA device here; pass device='cpu', or install "
            "a torch with CUDA and check nvidia-smi"
        )
    index = torch.cuda.current_device() if place.index is None else place.index
    if index >= count:
        raise ConfigError(
            f"device={str(place)!r}: torch sees {count} CUDA devices here, cuda:0 to cuda:{count - 1}"
        )
    return torch.device("cuda", index)
