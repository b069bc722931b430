"""Where a graph may have operators of ours in place of ATen's: on which device, for which shapes."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import fx

from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.graphs import dtype_name
from nanoflow_compiler.kernel_choice import LinearShape, keep, table_of

__all__ = ["Serving", "serving_of"]

_TYPES = ("bfloat16", "float16")
_CAPABILITY = (9, 0)
_PAGE_ROW_BYTES = 16
_MOST_NORMED = 16384


@dataclass(frozen=True, slots=True)
class Serving:
    """What passes ask before they put in an operator of ours."""

    linear: Callable[[LinearShape], bool]
    rotary: Callable[[torch.Tensor, torch.Tensor], bool]
    """Of fake keys and values ``[T, heads, dim]``."""
    norm: Callable[[torch.Tensor], bool]
    """Of fake rows ``[T, columns]``."""


def serving_of(module: fx.GraphModule, *, config: CompileConfig) -> Serving | None:
    """What serves a graph; None where nothing does."""
    if config.kernels == "own":
        return Serving(lambda _: True, lambda *_: True, lambda _: True)
    device = _device_of(module)
    if config.kernels == "aten" or device.type != "cuda" or not _has_kernels(device):
        return None
    table = table_of(torch.cuda.get_device_name(device))
    if config.gemms != "measure":
        return Serving(table.serves, _stores_pages, _norms)

    def is_faster(shape: LinearShape) -> bool:
        if shape.dtype in _TYPES and shape not in table.rows:
            measure = import_module("nanoflow_compiler.kernels.linear_timing").measure
            keep(measure(shape, device=device), device_name=torch.cuda.get_device_name(device))
        return table.serves(shape)

    return Serving(is_faster, _stores_pages, _norms)


def _device_of(module: fx.GraphModule) -> torch.device:
    values = (node.meta.get("val") for node in module.graph.find_nodes(op="placeholder"))
    devices = (value.device for value in values if isinstance(value, torch.Tensor))
    return next(devices, torch.device("cpu"))


def _has_kernels(device: torch.device) -> bool:
    known = find_spec("triton") is not None
    return known and torch.cuda.get_device_capability(device) >= _CAPABILITY


def _norms(rows: torch.Tensor) -> bool:
    return rows.shape[-1] <= _MOST_NORMED and dtype_name(rows.dtype) in _TYPES


def _stores_pages(key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a layer has pages of heads (see ``kv_cache``), and a kernel that rotates into them."""
    rows = (tensor.shape[-1] * tensor.element_size() for tensor in (key, value))
    return all(int(size) % _PAGE_ROW_BYTES == 0 for size in rows)
