"""``nanoflow bench startup``: from nothing to the first answer, with caches and without.

Every start is a process of its own. Caches are temporary directories: a cold start finds them empty,
a warm one as the last cold one left them. Downloading a model is not part of it.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from nanoflow_compiler.bench.model import ModelSettings
from nanoflow_compiler.bench.progress import progress
from nanoflow_compiler.bench.startup_server import start_server
from nanoflow_compiler.bench.startup_settings import StartupSettings
from nanoflow_compiler.errors import NanoflowError

__all__ = ["PARTS", "measure_startup", "print_startup"]

CACHES = {
    "NANOFLOW_CACHE": "nanoflow",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
}
PARTS = ("import", "cache", "trace", "passes", "clusters", "kernels", "bind")
"""Of ``compile``: the compiler itself; a kept step, read or written; the model's operations; what is done
to them; Inductor; what our kernels take longer than that; merged weights. A warm start needs few of them."""


def measure_startup(
    settings: StartupSettings, *, model: ModelSettings, engine: dict[str, Any]
) -> dict[str, Any]:
    """Seconds of each stage and in all, of every start."""
    from nanoflow_compiler.models.locate import resolve_model

    # By its path, since its name may lead to a cache that the processes are not to see.
    loading = model.loading()
    is_real = loading["load_format"] == "auto"
    place = str(resolve_model(model.name)) if is_real else model.name
    given = {"model": place, **loading, **engine}
    with progress("starts", total=settings.num_iters_cold + settings.num_iters_warm) as advance:
        starts = []
        for state, seconds in _starts(settings, given):
            starts.append({"caches": state, **seconds})
            advance(1)
    return {
        "starts": starts,
        **_summary("cold", [start for start in starts if start["caches"] == "cold"]),
        **_summary("warm", [start for start in starts if start["caches"] == "warm"]),
    }


def print_startup(found: Mapping[str, Any]) -> None:
    """Means of the stages in seconds, on standard output."""
    states = [state for state in ("cold", "warm") if f"{state}_stages" in found]
    table = Table("stage", *(f"{state} (s)" for state in states))
    has_parts = any(any(found[f"{state}_parts"].values()) for state in states)
    for stage in found[f"{states[0]}_stages"]:
        table.add_row(stage, *(f"{found[f'{state}_stages'][stage]:.2f}" for state in states))
        for part in PARTS if stage == "compile" and has_parts else ():
            seconds = (found[f"{state}_parts"].get(part, 0.0) for state in states)
            table.add_row(f"  {part}", *(f"{each:.2f}" for each in seconds))
    table.add_row("total", *(f"{found[f'avg_{state}_startup_time']:.2f}" for state in states))
    Console().print(table)


def _starts(
    settings: StartupSettings, given: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    start = _start_server if settings.server else _start
    for _ in range(settings.num_iters_cold - 1):
        with tempfile.TemporaryDirectory() as folder:
            yield "cold", start(given, folder)
    with tempfile.TemporaryDirectory() as folder:
        yield "cold", start(given, folder)
        for _ in range(settings.num_iters_warm):
            yield "warm", start(given, folder)


def _start(given: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Seconds of one start by stage: until the program runs (``python``), ..., and of one token."""
    caches = _caches(folder)
    child = [sys.executable, "-m", "nanoflow_compiler.bench.startup_child", json.dumps(given)]
    began = time.time()
    done = subprocess.run(["env", *caches, *child], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NanoflowError(f"a process that started the engine failed: {last}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    python, parts = answer.pop("began") - began, answer.pop("parts")
    seconds = {"python": python, "capture": 0.0, **answer}
    return {**seconds, "total": sum(seconds.values()), "parts": parts}


def _start_server(given: Mapping[str, Any], folder: str) -> dict[str, Any]:
    stages = start_server(given, environment=_caches(folder))
    return {**stages, "total": sum(stages.values()), "parts": {}}


def _caches(folder: str) -> list[str]:
    return [f"{name}={folder}/{place}" for name, place in CACHES.items()]


def _summary(state: str, starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not starts:
        return {}
    times = [start["total"] for start in starts]
    return {
        f"avg_{state}_startup_time": statistics.mean(times),
        f"{state}_startup_times": times,
        f"{state}_stages": {
            stage: statistics.mean(start[stage] for start in starts)
            for stage in starts[0]
            if stage not in ("caches", "total", "parts")
        },
        f"{state}_parts": {
            part: statistics.mean(start["parts"].get(part, 0.0) for start in starts)
            for part in PARTS
        },
    }
