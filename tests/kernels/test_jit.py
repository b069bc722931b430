"""Keys of our kernels in Triton's cache."""

import pkgutil
from importlib import import_module

import pytest

import nanoflow_compiler.kernels

JITFunction = pytest.importorskip("triton").runtime.jit.JITFunction

FOLDER = nanoflow_compiler.kernels.__path__
MODULES = [module.name for module in pkgutil.iter_modules(FOLDER, "nanoflow_compiler.kernels.")]


def test_keys_do_not_depend_on_what_was_launched_before():
    """Computed again when all others are known, each is what it was where the function was defined.

    That of a function that calls itself is not: there it does not know itself yet.
    """
    found = [item for name in MODULES for item in vars(import_module(name)).values()]
    functions = [
        item
        for item in found
        if isinstance(item, JITFunction) and item.__module__.startswith("nanoflow_compiler")
    ]
    assert len(functions) > 50
    for function in functions:
        if function.__name__ in function.fn.__code__.co_names:
            continue
        before, function.hash = function.hash, None
        assert function.cache_key == before, function
