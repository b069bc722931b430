"""What figures depend on: the machine, the versions, the commit and the command."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["environment"]

PACKAGES = ("nanoflow-compiler", "torch", "triton", "flashinfer-python", "transformers", "numpy")
SECRET = ("--api-key", "--header")


def environment(threads: int | None = None) -> dict[str, Any]:
    """As JSON holds it; ``threads`` are those of torch, where it computes on the CPU."""
    return {
        "command": _command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "gpus": _gpus(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def _command() -> str:
    """As it was typed, without what may be secret."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    for at, word in enumerate(words):
        flag, equals, _ = word.partition("=")
        if flag in SECRET and equals:
            words[at] = f"{flag}=***"
        elif flag in SECRET and at + 1 < len(words):
            words[at + 1] = "***"
    return shlex.join(words)


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _gpus() -> list[str]:
    """Asked of the driver's tool, since torch takes seconds to import."""
    # The limit of power, and the highest clock, decide what a card can sustain.
    fields = "name,memory.total,driver_version,power.limit,clocks.max.sm"
    query = [f"--query-gpu={fields}", "--format=csv,noheader"]
    return (_answer(["nvidia-smi", *query]) or "").splitlines()


def _version(package: str) -> str | None:
    """None for one that runs from its source."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that this package runs from, if it does; ``-dirty`` if files were changed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    commit = _answer([*git, "rev-parse", "HEAD"])
    changes = _answer([*git, "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}-dirty" if commit and changes else commit


def _answer(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
