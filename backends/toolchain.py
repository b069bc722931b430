"""Inductor's C++ compiler, made ready while a model is still being traced.

The first kernel of a machine pays for a check of the vector instructions and a precompiled header:
half of the time that a small model's kernels take. Both are subprocesses, and can run early.
"""

import logging
from threading import Thread

from torch._inductor.codecache import CppPythonBindingsCodeCache

__all__ = ["prepare_toolchain"]

_LOG = logging.getLogger(__name__)
_KERNEL = """
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C" void kernel(float* out) { at::vec::Vectorized<float>::loadu(out).store(out); }
"""


def prepare_toolchain() -> Thread:
    """Compile a small kernel in the background; what Inductor has already costs nothing."""
    thread = Thread(target=_compile_small_kernel, name="nanoflow-toolchain", daemon=True)
    thread.start()
    return thread


def _compile_small_kernel() -> None:
    try:
        CppPythonBindingsCodeCache.load_pybinding(["float*"], _KERNEL)
    except Exception as error:
        _LOG.debug("the C++ toolchain is not ready: %s", error)
