"""``triton.jit`` with a key that is the same in every process."""

from collections.abc import Callable
from typing import Any

import triton
from triton.runtime.jit import JITFunction

__all__ = ["jit"]


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """As ``triton.jit``, for all functions of ours that run on a GPU.

    Triton keeps a kernel under a hash of its source and of the constants of all functions that it calls,
    but of those only whose own hash was asked for before. So a kernel would be compiled anew by each
    process that launches kernels in another order. Here the hash is asked for where a function is defined,
    hence before those of its callers.
    """
    if function is None:
        return lambda given: jit(given, **options)
    made = triton.jit(function, **options)
    if isinstance(made, JITFunction):  # and nothing that Triton interprets
        _ = made.cache_key
    return made
