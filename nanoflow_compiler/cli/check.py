"""``nanoflow check``: what this machine can do, or how a model compiles."""

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nanoflow_compiler.cli.command import command
from nanoflow_compiler.cli.options import Device, Dtype
from nanoflow_compiler.config import cache_dir

__all__ = ["check"]

OPTIONAL_PACKAGES = {
    "gguf": "GGUF files, and the alias smollm2-135m",
    "accelerate": "GGUF files, and loading straight onto a GPU",
}
CXX_COMPILERS = ("g++", "clang++", "c++")


@command
def check(
    model: Annotated[str | None, typer.Argument(help="Also show how this model compiles.")] = None,
    *,
    dtype: Dtype = "auto",
    device: Device = "auto",
    load_format: Annotated[str, typer.Option(help="auto, or dummy: random weights.")] = "auto",
    num_hidden_layers: Annotated[
        int | None, typer.Option(help="Fewer layers; with --load-format dummy.")
    ] = None,
) -> None:
    """Show what this machine can do, or how a model compiles."""
    if model is None:
        _print_machine()
    else:
        loading = {"load_format": load_format, "num_hidden_layers": num_hidden_layers}
        _print_report(model, dtype=dtype, device=device, **loading)


def _print_report(model: str, **loading: Any) -> None:
    from nanoflow_compiler.inspection import inspect
    from nanoflow_compiler.models import load_decoder

    typer.echo(inspect(load_decoder(model, **loading)))


def _print_machine() -> None:
    table = Table(show_header=False, box=None)
    for name, value in _machine_facts():
        table.add_row(name, value)
    Console().print(table)


def _machine_facts() -> Iterator[tuple[str, str]]:
    import torch

    yield "python", sys.version.split()[0]
    for package in ("nanoflow-compiler", "torch", "transformers"):
        yield package, _version(package) or "absent"
    for package, use in OPTIONAL_PACKAGES.items():
        yield package, _version(package) or f"absent ({use})"
    compiler = next(filter(None, map(shutil.which, CXX_COMPILERS)), None)
    yield "C++ compiler", compiler or "absent (Inductor needs one on the CPU; install g++)"
    yield "CPU cores", str(len(os.sched_getaffinity(0)))
    yield "GPUs", ", ".join(_gpu_names(torch.cuda)) or "none"
    yield "cache", str(cache_dir())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu_names(cuda: Any) -> Iterator[str]:
    for index in range(cuda.device_count()):
        properties = cuda.get_device_properties(index)
        yield f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)"
