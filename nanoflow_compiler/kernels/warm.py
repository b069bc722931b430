"""Compiles our kernels for a model into Triton's cache, in a process of its own that sees no GPU.

``python -m nanoflow_compiler.kernels.warm JSON``, with the fields of :class:`Warmup`. Each kernel is called as
a step calls it, on tensors of a CPU that nobody reads. The calls are noted down, and processes that
share them compile what each would launch, for what Triton is told the GPU is: its front end is Python, so
that threads would wait for each other. What is not guessed right is compiled when a step first launches it.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from nanoflow_compiler.attention_plan import Visibility
from nanoflow_compiler.engine.draw import Draw
from nanoflow_compiler.engine.draw_columns import DrawColumns
from nanoflow_compiler.kernel_choice import Measured, table_of
from nanoflow_compiler.kernel_warmup import AttentionLayer, Warmup
from nanoflow_compiler.kernels import few_rows, gemm
from nanoflow_compiler.kernels.append import append_pages
from nanoflow_compiler.kernels.choose import choose_tokens
from nanoflow_compiler.kernels.gated import gate_rows
from nanoflow_compiler.kernels.norm import RmsNorm, rms_norm
from nanoflow_compiler.kernels.paged_decode import attend_pages, reads_with_room
from nanoflow_compiler.kernels.paged_prefill import attend_prompts, prompts_with_room
from nanoflow_compiler.kernels.rotary_append import Rotary, rotate_and_append
from nanoflow_compiler.kv_cache import BLOCK_SIZE, HeadPages
from nanoflow_compiler.scoring import Scoring

__all__ = ["compile_kernels"]

_NUM_ROWS = (16, 1024)
"""Of logits: few and many, which are spread differently."""
_NUM_TOKENS = 16
_ACTIVATION = "silu"
"""Of gates, as almost every model has it."""
_MOST_PROCESSES = 8
_FAILED = "a kernel was not compiled"

CompileFn = Callable[[], None]


def compile_kernels(warmup: Warmup, *, parent: int) -> str | None:
    """All kernels of a step of this model, several at a time; what went wrong, if anything did.

    It ends early, with its processes, when the other end of ``parent``, a pipe, is closed.
    """
    driver.set_active(_NoGpu(GPUTarget("cuda", warmup.capability, 32)))
    with _noted_calls() as calls:
        errors = [error for call in _groups(warmup) if (error := _error_of(call))]
    number = min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))
    forked = multiprocessing.get_context("fork")
    processes = [
        forked.Process(target=_compile_all, args=(calls[at::number],)) for at in range(number)
    ]
    for process in processes:
        process.start()
    _wait_for(processes, parent=parent)
    if errors:
        return str(errors[-1])
    return _FAILED if any(process.exitcode for process in processes) else None


def _wait_for(processes: Sequence[BaseProcess], *, parent: int) -> None:
    running = {process.sentinel for process in processes}
    while running:
        ended = set(connection.wait([parent, *running]))
        if parent in ended:
            for process in processes:
                process.kill()
            break
        running -= ended
    for process in processes:
        process.join()


def _compile_all(calls: Sequence[CompileFn]) -> None:
    """As many as can be; the last error is the exit's."""
    errors = [error for error in map(_error_of, calls) if error]
    if errors:
        sys.exit(str(errors[-1]))


def _error_of(call: Callable[[], None]) -> Exception | None:
    try:
        call()
    except Exception as error:  # whatever Triton trips over, a step may do without
        return error
    return None


def _compile(run: Callable[[], Any]) -> None:
    """The kernel, then the C code that takes its arguments from Python.

    Where that cannot be had, the first launch says why.
    """
    kernel = run()
    with suppress(Exception):
        launcher = import_module("triton.backends.nvidia.driver").CudaLauncher
        launcher(kernel.src, kernel.metadata)


def _groups(warmup: Warmup) -> Iterator[Callable[[], None]]:
    """Calls of kernels, of which each group may fail by itself."""
    for layer in warmup.layers:
        yield partial(_attend, layer)
    for num_rows in _NUM_ROWS:
        yield partial(_choose, num_rows, warmup)
        yield partial(_normalise, num_rows, warmup)
    yield partial(_gate, warmup)
    for measured in table_of(warmup.device_name).measured():
        if measured.shape.dtype == warmup.dtype:
            yield partial(_multiply, measured, warmup)


class _NoGpu:
    """The little that Triton asks of a driver until a kernel is launched."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


@contextmanager
def _noted_calls() -> Iterator[list[CompileFn]]:
    run = JITFunction.run
    calls: list[CompileFn] = []

    def noted(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        del warmup
        calls.append(partial(_compile, partial(run, self, *args, warmup=True, **kwargs)))

    JITFunction.run = noted
    try:
        yield calls
    finally:
        JITFunction.run = run


def _attend(layer: AttentionLayer) -> None:
    dtype: torch.dtype = getattr(torch, layer.dtype)
    shape = (2, layer.num_kv_heads, BLOCK_SIZE)
    pages = HeadPages(
        torch.zeros(*shape, layer.head_dim, dtype=dtype),
        torch.zeros(*shape, layer.v_head_dim, dtype=dtype),
    )

    def packed(num_heads: int, dim: int) -> torch.Tensor:
        return torch.zeros(_NUM_TOKENS, num_heads, dim, dtype=dtype)

    key, value = (packed(layer.num_kv_heads, dim) for dim in (layer.head_dim, layer.v_head_dim))
    slots = torch.zeros(_NUM_TOKENS, dtype=torch.int64)
    append_pages(key, value, pages, slots=slots)
    query, out = (packed(layer.num_heads, dim) for dim in (layer.head_dim, layer.v_head_dim))
    angles = Rotary(packed(1, layer.head_dim)[:, 0], packed(1, layer.head_dim)[:, 0])
    rotate_and_append(query, key, value, rotary=angles, pages=pages, slots=slots, pdl=True)
    visibility, scoring = Visibility(0, 0), Scoring(layer.head_dim**-0.5, layer.softcap, None)
    reads = reads_with_room(pages, visibility=visibility, num_pages=1)
    for is_captured in (True, False):
        attend_pages(query, pages, reads=reads, scoring=scoring, out=out, pdl=is_captured)
    tiles = prompts_with_room(
        pages, num_heads=layer.num_heads, visibility=visibility, num_tiles=1, num_pages=1
    )
    attend_prompts(query, pages, tiles=tiles, scoring=scoring, out=out)


def _choose(num_rows: int, warmup: Warmup) -> None:
    logits = torch.empty(num_rows, warmup.vocab_size, dtype=getattr(torch, warmup.dtype))
    columns = DrawColumns.none().padded(num_rows).arrays
    settings = Draw(*(torch.from_numpy(np.ascontiguousarray(column)) for column in columns))
    for is_captured in (True, False):
        choose_tokens(logits, settings, pdl=is_captured)


def _normalise(num_rows: int, warmup: Warmup) -> None:
    rows = torch.empty(num_rows, warmup.hidden_size, dtype=getattr(torch, warmup.dtype))
    rms_norm(rows, RmsNorm(rows[0], 1e-5), pdl=True)


def _gate(warmup: Warmup) -> None:
    """For products whose gate is not in their epilogue; of their width only its alignment counts."""
    product = torch.empty(_NUM_TOKENS, 2 * warmup.hidden_size, dtype=getattr(torch, warmup.dtype))
    gate_rows(product, activation=_ACTIVATION, pdl=True)


def _multiply(measured: Measured, warmup: Warmup) -> None:
    """What a table has of linears that read or write the hidden states of this model."""
    shape, tiling = measured.shape, dict(measured.choice.tiling)
    if warmup.hidden_size not in (shape.depth, shape.columns):
        return
    dtype: torch.dtype = getattr(torch, shape.dtype)
    x = torch.empty(min(_NUM_TOKENS, measured.rows_to), shape.depth, dtype=dtype)
    weight = torch.empty(shape.columns, shape.depth, dtype=dtype)
    residual = torch.empty(len(x), shape.columns, dtype=dtype)
    match measured.choice.implementation, shape.op:
        case "few_rows", "gated_linear":
            few = few_rows.FewRowsTiling(**tiling)
            few_rows.multiply_gated(x, weight, activation=_ACTIVATION, tiling=few, pdl=True)
        case "few_rows", op:
            few = few_rows.FewRowsTiling(**tiling)
            added = residual if op == "linear_add" else None
            few_rows.multiply(x, weight, residual=added, out=added, tiling=few, pdl=True)
        case "persistent", "gated_linear":
            gemm.multiply_gated(x, weight.t(), activation=_ACTIVATION, tiling=_tiling(tiling))
        case "persistent", op:
            added = residual if op == "linear_add" else None
            gemm.multiply(x, weight.t(), residual=added, out=added, tiling=_tiling(tiling))


def _tiling(given: dict[str, Any]) -> gemm.GemmTiling | None:
    return gemm.GemmTiling(**given) if given else None


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    layers = tuple(AttentionLayer(**layer) for layer in given.pop("layers"))
    sys.exit(compile_kernels(Warmup(layers=layers, **given), parent=sys.stdin.fileno()))
