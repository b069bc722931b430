"""Keys of our kernels in Triton's cache."""

import pkgutil
from importlib import import_module

import pytest

import nanoflow_compiler.kernels

JITFunction = pytest.importorskip("triton").runtime.jit.JITFunction
pytestmark = pytest.mark.gpu  # for Triton, which is installed there

FOLDER = nanoflow_compiler.kernels.__path__
MODULES = [module.name for module in pkgutil.iter_modules(FOLDER, "nanoflow_compiler.kernels.")]


def functions():
    found = [item for name in MODULES for item in vars(import_module(name)).values()]
    return [
        item
        for item in found
        if isinstance(item, JITFunction) and item.__module__.startswith("nanoflow_compiler")
    ]


def test_keys_do_not_depend_on_what_was_launched_before():
    """Computed again when all others are known, each is what it was where the function was defined.

    That of a function that calls itself is not: there it does not know itself yet.
    """
    assert len(functions()) > 50
    for function in functions():
        if function.__name__ in function.fn.__code__.co_names:
            continue
        before, function.hash = function.hash, None
        assert function.cache_key == before, function


def test_constants_of_one_name_are_equal():
    """Triton orders the constants of a kernel by name, then by where their module is in memory."""
    values = {}
    for function in functions():
        for (name, _), (value, _) in function.used_global_vals.items():
            assert values.setdefault(name, value) == value, name
