"""Compiled steps on disk: a warm start neither traces nor compiles.

A step is kept as a folder of what a person could read: ``step.json``, the generated programs, the
binding of weights, and Inductor's source of each cluster. It is named by a hash of all that the
compiler looked at: configuration, code of the model and of this package, versions, weights' names
and layouts (never their values), device and options.
"""

import hashlib
import inspect
import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers

from nanoflow_compiler.backends import Executable
from nanoflow_compiler.backends.binding import InputBinder, InputLayout
from nanoflow_compiler.backends.clusters import Kernels, load_kernel
from nanoflow_compiler.backends.codegen import CodegenExecutable
from nanoflow_compiler.backends.gemm_timing import GemmShape, time_packed
from nanoflow_compiler.backends.lanes import Budgets
from nanoflow_compiler.backends.source import Function
from nanoflow_compiler.backends.streams import StreamsExecutable
from nanoflow_compiler.config import CompileConfig, cache_dir
from nanoflow_compiler.graphs import dtype_name
from nanoflow_compiler.kernel_choice import identity_of
from nanoflow_compiler.models.hf import PackedDecoder
from nanoflow_compiler.pipeline import CompiledGraph

__all__ = ["load_step", "save_step", "step_folder"]

_LOG = logging.getLogger(__name__)
_NOT_KEYS = ("dump", "cache")


def step_folder(packed: PackedDecoder, config: CompileConfig) -> Path:
    """Where the step of this decoder, compiled with these options on this machine, is kept."""
    digest = hashlib.sha256()
    for part in _identity(packed, config):
        digest.update(part.encode() + b"\0")
    return cache_dir() / "steps" / digest.hexdigest()[:24]


def _identity(packed: PackedDecoder, config: CompileConfig) -> Iterator[str]:
    yield _own_source()
    yield from (torch.__version__, transformers.__version__, platform.python_version())
    yield from (platform.machine(), torch.backends.cpu.get_cpu_capability())
    yield str(torch.get_num_threads())
    yield torch.cuda.get_device_name(packed.device) if packed.device.type == "cuda" else "cpu"
    yield str(packed.device)  # generated sources name it
    yield repr({key: value for key, value in asdict(config).items() if key not in _NOT_KEYS})
    if packed.device.type == "cuda":  # whose tables say which operators a graph has
        own = config.gemms != "measure"  # while compiling, which changes what was measured
        yield identity_of(torch.cuda.get_device_name(packed.device), with_measured=own)
    yield f"{packed.max_length} {type(packed.model).__qualname__}"
    yield Path(inspect.getfile(type(packed.model))).read_text(encoding="utf-8")
    yield packed.model.config.to_json_string(use_diff=False)
    seen: dict[int, int] = {}
    for name, tensor in [*packed.named_parameters(), *packed.named_buffers()]:
        storage = seen.setdefault(tensor.untyped_storage().data_ptr(), len(seen))
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {storage}"


@cache
def _own_source() -> str:
    """A hash of this package's files, so that no edit of a pass meets an old step."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for folder in (root, root / "passes", root / "backends", root / "models", root / "ir"):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def save_step(folder: Path, compiled: CompiledGraph) -> None:
    """Keep a compiled graph; one that holds what cannot be written is left alone.

    Written beside its place and moved there, so a reader finds all of it or nothing.
    """
    try:
        files = _files(compiled)
    except _NotPortable as reason:
        _LOG.info("the compiled step is not kept: %s", reason)
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as partial:
            for name, text in files.items():
                Path(partial, name).write_text(text, encoding="utf-8")
            Path(partial).replace(folder)
    except OSError as error:  # a full disk, or another process that was first
        _LOG.info("the compiled step is not kept: %s", error)


class _NotPortable(Exception):  # noqa: N818 - not an error: such a step is compiled each time
    """What a step holds that text cannot say."""


class _Outdated(Exception):  # noqa: N818 - not an error: such a step is compiled once more
    """Why a kept step is no longer what would be compiled."""


def _files(compiled: CompiledGraph) -> dict[str, str]:
    """Contents by file name."""
    kernels, layout = compiled.kernels, compiled.binder.layout
    if len(kernels.portable) < len(kernels.sources):
        raise _NotPortable("a cluster runs uncompiled, or is more than its text")
    programs = [_codegen(executable) for executable in compiled.executables]
    functions = {name: item for each in programs for name, item in each.names.items()}
    functions |= compiled.binder.names
    step = {
        "decision": compiled.decision,
        "layout": asdict(layout) | {"source": "binding.py"},
        "programs": [_described(program) for program in programs],
        "clusters": sorted(kernels.sources),
        "unmeasured": _unmeasured(compiled.measured),
        "functions": {
            name: _reference(item)
            for name, item in functions.items()
            if name not in kernels.sources
        },
    }
    return {
        "step.json": json.dumps(step, indent=1),
        "binding.py": layout.source,
        **{f"program_{at}.py": program.source for at, program in enumerate(programs)},
        **{f"{name}.py": source for name, source in kernels.sources.items()},
    }


def _described(program: CodegenExecutable) -> dict[str, Any]:
    lanes = None
    if isinstance(program, StreamsExecutable):
        lanes = {"device": str(program.device), "budgets": asdict(program.budgets)}
    return {"cells": program.num_cells, "parts": program.attention_parts, "lanes": lanes}


def _unmeasured(shapes: Iterable[GemmShape]) -> list[list[Any]]:
    """Those that are packed because the machine was too busy to measure."""
    return [
        [shape.depth, shape.columns, dtype_name(shape.dtype)]
        for shape in shapes
        if not time_packed(shape).is_steady
    ]


def _codegen(executable: Executable) -> CodegenExecutable:
    if not isinstance(executable, CodegenExecutable):
        raise _NotPortable(f"{type(executable).__name__} runs from the graph")
    return executable


def _reference(item: Any) -> str:
    """``module:name`` of a function that a generated source calls."""
    module, name = getattr(item, "__module__", ""), getattr(item, "__qualname__", "")
    if not module or not name or getattr(import_module(module), name, None) is not item:
        raise _NotPortable(f"{item!r} has no name to import it by")
    return f"{module}:{name}"


def load_step(folder: Path) -> CompiledGraph | None:
    """What :func:`save_step` kept; None where nothing is, or where it does not load."""
    if not (folder / "step.json").is_file():
        return None
    try:
        return _load(folder)
    except _Outdated as reason:
        _LOG.info("%s is compiled anew: %s", folder, reason)
    except Exception as error:
        _LOG.warning("%s does not load and is compiled anew: %s", folder, error)
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _load(folder: Path) -> CompiledGraph:
    def text(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    step = json.loads(text("step.json"))
    _measure_again(folder, step)
    sources = {name: text(f"{name}.py") for name in step["clusters"]}
    kernels = Kernels({name: load_kernel(source) for name, source in sources.items()}, sources)
    names = kernels.compiled | {n: _find(path) for n, path in step["functions"].items()}
    layout = step["layout"]
    binding = InputLayout(
        source=text("binding.py"),
        weights=tuple(layout["weights"]),
        merged=tuple(map(tuple, layout["merged"])),
        packed=tuple(layout["packed"]),
        live=tuple((index, position) for index, position in layout["live"]),
    )
    programs = tuple(
        _program(Function(text(f"program_{at}.py"), names), program, folder / f"program_{at}.py")
        for at, program in enumerate(step["programs"])
    )
    return CompiledGraph(
        executables=programs,
        binder=InputBinder(binding, names),
        kernels=kernels,
        decision=step["decision"],
    )


def _program(function: Function, step: dict[str, Any], path: Path) -> CodegenExecutable:
    parts = tuple((first, last) for first, last in step["parts"])
    if not step["lanes"]:
        return CodegenExecutable(function, parts=parts, cells=step["cells"], path=path)
    return StreamsExecutable(
        function,
        parts=parts,
        cells=step["cells"],
        path=path,
        device=torch.device(step["lanes"]["device"]),
        budgets=Budgets(**step["lanes"]["budgets"]),
    )


def _measure_again(folder: Path, step: dict[str, Any]) -> None:
    """What was packed unmeasured is measured now, unless the machine is busy once more."""
    given = step["unmeasured"]
    shapes = [GemmShape(depth, columns, getattr(torch, name)) for depth, columns, name in given]
    for shape in shapes:
        if not time_packed(shape).is_worth_it:
            raise _Outdated(f"ATen is faster on weights of {shape.depth} x {shape.columns}")
    step["unmeasured"] = _unmeasured(shapes)
    if step["unmeasured"] == given:
        return
    partial = folder / f"step.{os.getpid()}"
    with suppress(OSError):  # a cache that others share may be read only
        partial.write_text(json.dumps(step, indent=1), encoding="utf-8")
        partial.replace(folder / "step.json")


def _find(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)
