"""Attention of long prompts by FlashInfer's kernel for Hopper, over the same pages as ours.

The kernel reads from the device what each thread block computes. FlashInfer's own planner brings it there
with a copy at once, and into memory of its own; ours makes the same arrays on the host, and they go where
all plans go, so that a captured step is given new ones without waiting. Their format is no interface, but
that of a release: others are not used. Nor is anything compiled: only what the package brings.
"""

from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoflow_compiler.attention_plan import Requests, Visibility
from nanoflow_compiler.kernels.flash_plan import ITEM_FIELDS, QUERIES, Int32s, plan_flash
from nanoflow_compiler.kv_cache import HeadPages
from nanoflow_compiler.scoring import Scoring
from nanoflow_compiler.sm_budget import current_sms

__all__ = ["FlashTiles", "attend_flash", "flash_with_room", "least_keys", "plan_flash_prompts"]

_RELEASE = "0.6.14"
_NAME = (
    "batch_prefill_with_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32"
    "_head_dim_qk_{dim}_head_dim_vo_{dim}_posenc_0_use_swa_False_use_logits_cap_False_f16qk_False_sm90"
)
_LEAST_KEYS = {128: 2048}
"""By dimensions of a head: the keys that a row of a prompt sees on average, from where on it is faster.

Measured by ``benchmarks/prefill_attention.py`` on one H200, with 32 heads over 8 KV heads: of 8 x 4096
tokens (2048 keys) 466 TFLOP/s against 412 of ours, of 2 x 512 tokens (256 keys) 182 against 238.
"""
_CAUSAL = 1
_HEADS_FIRST = 1
"""A page is ``[heads, tokens, dim]``."""
_NO_WINDOW = -1


@dataclass(frozen=True, slots=True)
class FlashTiles:
    """Who computes which queries: a :class:`FlashPlan` on the device."""

    tensors: tuple[Tensor, ...]
    """The rows of its items, their ends, and the blocks: all in the same memory."""
    heads: tuple[int, int]
    """Of queries, and of keys."""
    num_ctas: int

    def arrays(self, requests: Requests) -> tuple[Int32s, ...]:
        """What goes to the beginning of :attr:`tensors`, to serve the prompts of these requests."""
        chosen = requests.prompts
        plan = plan_flash(
            requests.starts[chosen],
            counts=requests.starts[chosen + 1] - requests.starts[chosen],
            positions=requests.contexts[chosen],
            tables=requests.tables[chosen],
            heads=self.heads,
            num_ctas=self.num_ctas,
        )
        return (*plan.items, plan.ends, plan.blocks)

    @property
    def blocks(self) -> Tensor:
        return self.tensors[-1]

    @property
    def offsets(self) -> list[int]:
        """In bytes from the first tensor, in the kernel's order; heads need no schedules of their own."""
        begin = self.tensors[0].data_ptr()
        tiles, of_heads, rows, places, queries, keys, ends = (
            tensor.data_ptr() - begin for tensor in self.tensors[:-1]
        )
        requests = tiles  # which request it is, only other kinds of masks ask
        has_one_schedule = 0
        return [tiles, rows, places, queries, keys, of_heads, ends, requests, has_one_schedule]


def least_keys(pages: HeadPages, *, visibility: Visibility) -> int | None:
    """Of a prompt's rows on average, for the kernel to be faster; None where it does not serve."""
    keys, values = pages.keys, pages.values
    dim = keys.shape[-1]
    is_served = (
        visibility == Visibility()
        and keys.dtype is torch.bfloat16
        and values.shape == keys.shape
        and values.stride() == keys.stride()
        and dim in _LEAST_KEYS
        and keys.is_cuda
        and torch.cuda.get_device_capability(keys.device) == (9, 0)
        and _kernel(dim) is not None
    )
    return _LEAST_KEYS[dim] if is_served else None


def plan_flash_prompts(requests: Requests, pages: HeadPages, *, num_heads: int) -> FlashTiles:
    """Of the requests of a part that have several rows."""
    tiles = _tiles((), pages, num_heads=num_heads)
    return replace(tiles, tensors=tuple(requests.tensors(tiles.arrays(requests))))


def flash_with_room(
    pages: HeadPages, *, num_heads: int, num_tokens: int, num_prompts: int, num_pages: int
) -> FlashTiles:
    """Of nothing yet, with room for so many prompts of so many tokens and pages in all."""
    num_tiles = num_tokens // QUERIES + num_prompts
    widths = [num_tiles * num_heads] * ITEM_FIELDS + [current_sms(pages.keys.device) + 1, num_pages]
    memory = torch.zeros(sum(widths), dtype=torch.int32, device=pages.keys.device)
    return _tiles(memory.split(widths), pages, num_heads=num_heads)


def _tiles(tensors: tuple[Tensor, ...], pages: HeadPages, *, num_heads: int) -> FlashTiles:
    heads = (num_heads, pages.keys.shape[1])
    return FlashTiles(tensors, heads, num_ctas=current_sms(pages.keys.device))


def attend_flash(
    query: Tensor, pages: HeadPages, *, tiles: FlashTiles, scoring: Scoring, out: Tensor
) -> None:
    """Write the rows of ``tiles`` in ``out [T, heads, dim]``, for ``query [T, heads, dim]``."""
    assert scoring.is_plain
    kernel = _kernel(query.shape[-1])
    assert kernel is not None
    work, blocks = tiles.tensors[0], tiles.blocks
    kernel(
        work,  # says only which device it is
        work,
        tiles.offsets,
        _aligned(query),
        pages.keys,
        pages.values,
        *(blocks, blocks, blocks, blocks),  # only the third is read
        out,
        None,  # no sums of weights
        _CAUSAL,
        _HEADS_FIRST,
        _NO_WINDOW,
        False,  # begins when the kernel before has ended
        *(None, None, None, None),  # no other masks, no scale of values
        0.0,  # no soft cap
        scoring.scale,
        1.0,
        0,
    )


def _aligned(query: Tensor) -> Tensor:
    """As the copy engine reads it: rows and heads begin at multiples of 16 bytes."""
    steps = (query.data_ptr(), *(stride * query.itemsize for stride in query.stride()[:2]))
    is_aligned = query.stride(-1) == 1 and all(step % 16 == 0 for step in steps)
    return query if is_aligned else query.clone(memory_format=torch.contiguous_format)


@cache
def _kernel(dim: int) -> Any:
    """The kernel that the package has compiled for a size of heads; None without it."""
    library = _library(_NAME.format(dim=dim))
    if library is None or not library.exists():
        return None
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return None  # tvm_ffi would not know on which stream to launch
    return import_module("tvm_ffi").load_module(str(library)).paged_run


def _library(name: str) -> Path | None:
    """Where it is if it was compiled ahead: beside the sources, or in a package of its own."""
    try:
        if version("flashinfer-python") != _RELEASE:
            return None
    except PackageNotFoundError:
        return None
    if find_spec("flashinfer_jit_cache"):
        folder = Path(import_module("flashinfer_jit_cache").get_jit_cache_dir())
    else:
        package = find_spec("flashinfer")
        if package is None or package.origin is None:
            return None
        folder = Path(package.origin).parent / "data" / "aot"
    return folder / name / f"{name}.so"
