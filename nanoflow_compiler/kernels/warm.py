"""Compiles our kernels for a model into Triton's cache, in a process of its own that sees no GPU.

``python -m nanoflow_compiler.kernels.warm JSON``, with the fields of :class:`Warmup`. Each kernel is called as
a step calls it, on tensors of a CPU that nobody reads: Triton compiles for what it is told the GPU is, and
launches nothing. What is not guessed right is compiled when a step first launches it.
"""

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime._async_compile import AsyncCompileMode
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from nanoflow_compiler.attention_plan import Visibility
from nanoflow_compiler.engine.draw import Draw
from nanoflow_compiler.engine.draw_columns import DrawColumns
from nanoflow_compiler.kernel_warmup import AttentionLayer, Warmup
from nanoflow_compiler.kernels.append import append_pages
from nanoflow_compiler.kernels.choose import choose_tokens
from nanoflow_compiler.kernels.paged_decode import attend_pages, reads_with_room
from nanoflow_compiler.kernels.paged_prefill import attend_prompts, prompts_with_room
from nanoflow_compiler.kv_cache import BLOCK_SIZE, HeadPages
from nanoflow_compiler.scoring import Scoring

__all__ = ["compile_kernels"]

_NUM_ROWS = (16, 1024)
"""Of logits: few and many, which are spread differently."""
_NUM_TOKENS = 16
_NUM_THREADS = 6


def compile_kernels(warmup: Warmup) -> None:
    """All kernels of a step of this model, several at a time."""
    with (
        _compiling_only(GPUTarget("cuda", warmup.capability, 32)),
        ThreadPoolExecutor(_NUM_THREADS) as threads,
        AsyncCompileMode(threads, ignore_errors=True),
    ):
        for layer in warmup.layers:
            _attend(layer)
        for num_rows in _NUM_ROWS:
            _choose(num_rows, warmup)


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
def _compiling_only(target: GPUTarget) -> Iterator[None]:
    run = JITFunction.run

    def compiled(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        del warmup
        return run(self, *args, warmup=True, **kwargs)

    JITFunction.run = compiled
    driver.set_active(_NoGpu(target))
    try:
        yield
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
    append_pages(key, value, pages, slots=torch.zeros(_NUM_TOKENS, dtype=torch.int64))
    query, out = (packed(layer.num_heads, dim) for dim in (layer.head_dim, layer.v_head_dim))
    visibility, scoring = Visibility(0, 0), Scoring(layer.head_dim**-0.5, layer.softcap, None)
    reads = reads_with_room(pages, visibility=visibility, num_pages=1)
    attend_pages(query, pages, reads=reads, scoring=scoring, out=out)
    tiles = prompts_with_room(
        pages, num_heads=layer.num_heads, visibility=visibility, num_tiles=1, num_pages=1
    )
    attend_prompts(query, pages, tiles=tiles, scoring=scoring, out=out)


def _choose(num_rows: int, warmup: Warmup) -> None:
    logits = torch.empty(num_rows, warmup.vocab_size, dtype=getattr(torch, warmup.dtype))
    columns = DrawColumns.none().padded(num_rows).arrays
    choose_tokens(logits, Draw(*(torch.from_numpy(np.ascontiguousarray(c)) for c in columns)))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    layers = tuple(AttentionLayer(**layer) for layer in given.pop("layers"))
    compile_kernels(Warmup(layers=layers, **given))
