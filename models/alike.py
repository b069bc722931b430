"""Whether two modules compute the same of the same inputs, with weights of their own.

Nothing is known of what a module computes; what is compared is all that it could look at: classes, the
tree of submodules, kinds and shapes of weights, and attributes. An attribute may differ where the first
module never read it, which is recorded while it runs: the number of a layer, for one.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nanoflow_compiler.graphs import form_of

__all__ = ["Reads", "attention_numbers", "is_alike", "state_of", "watched"]

Reads = set[tuple[nn.Module, str]]
"""Attributes that were read, by module."""
_CALLS = "nanoflow_calls"
_WEIGHTS = ("_parameters", "_buffers", "_modules")
_PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device, torch.Size)


@contextmanager
def watched(module: nn.Module) -> Iterator[Reads | None]:
    """What is read of ``module`` and of what is in it, until the end; None where a class refuses it."""
    reads: Reads = set()
    classes = {part: type(part) for part in module.modules()}
    try:
        for part, kind in classes.items():
            part.__class__ = _watched_class(kind, reads)
    except TypeError:  # of a class that has slots, or wants arguments of its subclasses
        _restore(classes)
        yield None
        return
    try:
        yield reads
    finally:
        _restore(classes)


def _restore(classes: dict[nn.Module, type[nn.Module]]) -> None:
    for part, kind in classes.items():
        part.__class__ = kind


def _watched_class(kind: type[nn.Module], reads: Reads) -> type[nn.Module]:
    def read(module: nn.Module, name: str) -> Any:
        value = kind.__getattribute__(module, name)
        if name != "__dict__" and name in module.__dict__:
            reads.add((module, name))
        return value

    names = {"__getattribute__": read, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), names | {"__qualname__": kind.__qualname__})


def is_alike(first: nn.Module, second: nn.Module, *, reads: Reads) -> bool:
    """Whether ``second`` does what ``first`` did when it made these reads."""
    parts, others = ([*module.named_modules(remove_duplicate=False)] for module in (first, second))
    if [name for name, _ in parts] != [name for name, _ in others]:
        return False
    return all(
        _is_alike(part, other, reads=reads)
        for (_, part), (_, other) in zip(parts, others, strict=True)
    )


def _is_alike(first: nn.Module, second: nn.Module, *, reads: Reads) -> bool:
    """Of two modules themselves; what is in them is compared beside them."""
    if first is second:
        return True
    if type(first) is not type(second) or _weights(first) != _weights(second):
        return False
    mine, other = vars(first), vars(second)
    return all(
        _is_equal(mine.get(name, _MISSING), other.get(name, _MISSING))
        for name in (mine.keys() | other.keys()) - {*_WEIGHTS, _CALLS, "forward"}
        if (first, name) in reads or (name in other) != (name in mine)
    ) and _visible(first) == _visible(second)


_MISSING = object()


def _weights(module: nn.Module) -> list[Any]:
    tensors = [*module._parameters.items(), *module._buffers.items()]
    return [(name, None if value is None else form_of(value)) for name, value in tensors]


def _visible(module: nn.Module) -> list[tuple[int, int]]:
    """Window and chunk of each attention call."""
    return [(window, chunk) for _, window, chunk in getattr(module, _CALLS, ())]


def _is_equal(first: Any, second: Any) -> bool:
    """Whether nothing can be told from one that cannot from the other, as far as that is sure."""
    if first is second or type(first) is not type(second):
        return first is second
    if isinstance(first, Mapping):
        return _is_equal([*first.items()], [*second.items()])
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_is_equal, first, second))
    items = first if isinstance(first, set | frozenset) else (first,)
    return all(isinstance(item, _PLAIN) for item in items) and bool(first == second)


def attention_numbers(first: nn.Module, second: nn.Module) -> dict[int, int]:
    """The attention layers that ``first`` calls, and in their place those of ``second``, which is alike."""
    return dict(zip(_numbers(first), _numbers(second), strict=True))


def _numbers(module: nn.Module) -> Iterable[int]:
    return [call[0] for part in module.modules() for call in getattr(part, _CALLS, ())]


def state_of(module: nn.Module) -> list[Any]:
    """What changes when a module changes itself; equal where it did not."""
    return [
        {name: _frozen(value) for name, value in vars(part).items()} for part in module.modules()
    ]


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return [(name, _frozen(item)) for name, item in value.items()]
    if isinstance(value, list | tuple):
        return [_frozen(item) for item in value]
    return value if isinstance(value, (*_PLAIN, set, frozenset)) else id(value)
