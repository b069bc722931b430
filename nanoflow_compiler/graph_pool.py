"""CUDA graphs that share their memory, and what is left when one cannot be captured: nothing."""

import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["GraphPool", "failed_at", "reason_of"]


class GraphPool:
    """Captures work as graphs of which only one runs at a time."""

    def __init__(self) -> None:
        self._stream = _capture_stream(torch.cuda.current_device())
        self._memory = torch.cuda.graph_pool_handle()

    def capture(
        self, launch: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
        """What ``launch`` launches, and what it returns: until another graph of the pool runs."""
        graph, outputs = self.capture_held(launch)
        return graph, tuple(map(_borrowed, outputs))

    def capture_held(self, launch: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """The same, but what ``launch`` returns keeps its memory for itself.

        The error of a capture that fails is that of ``launch``, and the current stream is as before.
        """
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # memory that is kept for other work is out of a capture's reach
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                outputs = launch()
                graph.capture_end()
            except BaseException:
                # All that they say is that a capture failed, and that one is empty.
                with warnings.catch_warnings(action="ignore"):
                    self._abandon(graph)
                raise
        return graph, outputs

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed. What it does not end itself, is ended here, or it goes on for good:
        the allocator's, and that of the generator, from which every draw would be an error.
        """
        memory, self._memory = self._memory, torch.cuda.graph_pool_handle()
        with suppress(RuntimeError):
            graph.capture_end()
        with suppress(RuntimeError):  # of an end that came as far as this
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), memory)
        with suppress(RuntimeError):  # of a device that is lost
            _capture_nothing()


def _capture_nothing() -> None:
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    graph.capture_end()


def reason_of(error: BaseException) -> str:
    """The first line of what it says; of one that says nothing, its kind."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def failed_at(error: BaseException) -> str:
    """Where a generated program failed, each of whose lines is an operation; empty outside of one."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.line for frame in frames if _is_generated(frame)]
    return f" at `{lines[-1]}`" if lines else ""


def _is_generated(frame: traceback.FrameSummary) -> bool:
    """By its name: Triton and others have functions called ``run`` as well."""
    is_dumped = frame.name == "run" and Path(frame.filename).name.startswith("program_")
    return frame.filename.startswith("<nanoflow") or is_dumped


@cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """The same for all pools: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)


class _Memory:
    """Of a tensor, without keeping it; as integers, because the interface has no bfloat16."""

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": f"<i{tensor.itemsize}",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def _borrowed(tensor: Tensor) -> Tensor:
    """The same memory, which the next graph may use: logits of all graphs would be gigabytes."""
    return torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype)
