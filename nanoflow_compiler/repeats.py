"""Layers that are alike are traced once: the others repeat what the first one did, with their weights.

While ``make_fx`` records a decoder, the members of its lists of modules come by here. The first of a
kind is traced, and watched: which operations it adds to the graph, and which of its attributes it reads.
One that could not have done anything else, called with inputs of the same form, gets copies of those
operations. Whatever cannot be followed is traced as ever; the graph is the same either way.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    track_tensor_tree,
)
from torch.utils import _pytree as pytree

from nanoflow_compiler import ops
from nanoflow_compiler.graphs import form_of, is_size
from nanoflow_compiler.models.alike import (
    Reads,
    attention_numbers,
    is_alike,
    state_of,
    watched,
)

__all__ = ["LayerRepeats"]

_CONSTANTS = (int, float, str, bool, type(None), torch.dtype, torch.device)
_LAYER = 3
"""Where the arguments of an attention say which layer it is."""
_FEWEST = 3
"""A list of two would be compared for one repetition."""


class LayerRepeats:
    """What was traced of a decoder's layers so far."""

    def __init__(self) -> None:
        self.num_repeated = 0
        self._traced: list[_TracedLayer] = []

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """In here, calls of the model's layers are repeated where they can be."""
        layers = [layer for layer in _layers(model) if "forward" not in vars(layer)]
        for layer in layers:
            layer.forward = partial(self._call, layer, layer.forward)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    @property
    def is_sound(self) -> bool:
        """Whether what is inside of a layer that was repeated was used by nothing outside of it."""
        return not self.num_repeated or not any(map(_is_used_outside, self._traced))

    def _call(
        self, layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        call = _Call.of((args, kwargs))
        if call is None:
            return forward(*args, **kwargs)
        for traced in self._traced:
            if traced.fits(layer, call):
                self.num_repeated += 1
                return _repeat(traced, layer, call)
        return self._trace(layer, call, partial(forward, *args, **kwargs))

    def _trace(self, layer: nn.Module, call: "_Call", forward: Callable[[], Any]) -> Any:
        last = next(iter(reversed(call.graph.nodes)))
        before = state_of(layer)
        with watched(layer) as reads:
            result = forward()
        made = _made_after(last)
        returned = _Call.of(result)
        if reads is None or returned is None:
            return result
        if state_of(layer) == before and call.is_unchanged:
            traced = _TracedLayer(layer, call, returned, made, reads, _weights(layer, call.tracer))
            if traced.is_closed:
                self._traced.append(traced)
        return result


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """Members of the outermost lists of one class."""
    for child in model.children():
        kinds = {type(member) for member in child.children()}
        if isinstance(child, nn.ModuleList) and len(child) >= _FEWEST and len(kinds) < len(child):
            yield from dict.fromkeys(child)
        else:
            yield from _layers(child)


@dataclass(frozen=True, slots=True)
class _Call:
    """Values that go into a layer, or come out: tensors of the trace, and constants."""

    tracer: Any
    given: Any
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    nodes: tuple[fx.Node | None, ...]
    """Of tensors."""

    @classmethod
    def of(cls, given: Any) -> "_Call | None":
        """None where a value is neither."""
        tracer = _tracer()
        leaves, spec = pytree.tree_flatten(given)
        nodes = [_node_of(leaf, tracer) if isinstance(leaf, Tensor) else None for leaf in leaves]
        if tracer is None or not all(
            isinstance(leaf, _CONSTANTS) if node is None else True
            for leaf, node in zip(leaves, nodes, strict=True)
        ):
            return None
        return cls(tracer, given, tuple(leaves), spec, tuple(nodes))

    @property
    def graph(self) -> fx.Graph:
        graph: fx.Graph = self.tracer.graph
        return graph

    @property
    def forms(self) -> list[Any]:
        """Equal for calls that a layer cannot tell from each other."""
        return [
            (type(leaf), leaf) if node is None else form_of(leaf)
            for leaf, node in zip(self.leaves, self.nodes, strict=True)
        ]

    @property
    def is_unchanged(self) -> bool:
        """Whether lists and dictionaries hold what they held."""
        leaves, spec = pytree.tree_flatten(self.given)
        same = len(leaves) == len(self.leaves) and spec == self.spec
        return same and all(a is b for a, b in zip(leaves, self.leaves, strict=True))


def _tracer() -> Any:
    mode = get_proxy_mode()
    return None if mode is None else mode.tracer


def _node_of(tensor: Tensor, tracer: Any) -> fx.Node | None:
    slot: Any = get_proxy_slot(tensor, tracer, None)
    return None if slot is None or slot.constant is not None else slot.proxy.node


def _weights(layer: nn.Module, tracer: Any) -> dict[str, fx.Node | None]:
    named = [
        *layer.named_parameters(remove_duplicate=False),
        *layer.named_buffers(remove_duplicate=False),
    ]
    return {name: _node_of(weight, tracer) for name, weight in named}


def _made_after(last: fx.Node) -> tuple[fx.Node, ...]:
    made, node = [], last.next
    while node.op != "root":
        made.append(node)
        node = node.next
    return tuple(made)


@dataclass(frozen=True, slots=True)
class _TracedLayer:
    """A call that was traced, and all that it depended on."""

    layer: nn.Module
    call: _Call
    returned: _Call
    made: tuple[fx.Node, ...]
    reads: Reads
    weights: Mapping[str, fx.Node | None]
    forms: Sequence[Any] = field(init=False)

    def __post_init__(self) -> None:
        """The forms of what went in, while it is as it was."""
        object.__setattr__(self, "forms", self.call.forms)

    @property
    def is_closed(self) -> bool:
        """Whether it computed of its inputs and weights alone, and sizes are known by name."""
        known = {*self.call.nodes, *self.weights.values(), *self.made}
        read = {arg for node in self.made for arg in node.all_input_nodes}
        returned = {node for node in self.returned.nodes if node is not None}
        return (
            all(node in known or is_size(node) for node in read)
            and returned <= known
            and not any("unbacked_bindings" in node.meta for node in self.made)
        )

    def fits(self, layer: nn.Module, call: _Call) -> bool:
        """Whether the other layer, called so, would do the same."""
        return (
            call.tracer is self.call.tracer
            and call.spec == self.call.spec
            and call.forms == self.forms
            and is_alike(self.layer, layer, reads=self.reads)
            and self.places(layer, call) is not None
        )

    def places(self, layer: nn.Module, call: _Call) -> dict[fx.Node, fx.Node] | None:
        """What stands for each of its inputs and weights; None where two were one, and are not now."""
        theirs = _weights(layer, call.tracer)
        pairs = [
            *zip(self.call.nodes, call.nodes, strict=True),
            *((node, theirs.get(name)) for name, node in self.weights.items()),
        ]
        places: dict[fx.Node, fx.Node] = {}
        for mine, other in pairs:
            if (mine is None) != (other is None):
                return None
            if mine is not None and other is not None and places.setdefault(mine, other) != other:
                return None
        return places


def _is_used_outside(traced: _TracedLayer) -> bool:
    """By something else than what it returns; sizes are the same for all layers."""
    made = set(traced.made)
    inside = made - set(traced.returned.nodes)
    users = {user for node in inside if not is_size(node) for user in node.users}
    return any(user not in made and not is_size(user) for user in users)


def _repeat(traced: _TracedLayer, layer: nn.Module, call: _Call) -> Any:
    places = traced.places(layer, call)
    assert places is not None, "the layer fits"
    numbers = attention_numbers(traced.layer, layer)
    for node in traced.made:
        copy = call.graph.node_copy(node, lambda arg: places.get(arg, arg))
        if node.target is ops.attention:
            copy.update_arg(_LAYER, numbers[copy.args[_LAYER]])  # type: ignore[index]
        places[node] = copy
    given = dict(zip(call.nodes, call.leaves, strict=True))
    values: dict[fx.Node, Tensor] = {}
    leaves = [
        leaf if node is None else _value(node, leaf, places, given=given, values=values, call=call)
        for leaf, node in zip(traced.returned.leaves, traced.returned.nodes, strict=True)
    ]
    return pytree.tree_unflatten(leaves, traced.returned.spec)


def _value(
    node: fx.Node,
    like: Tensor,
    places: Mapping[fx.Node, fx.Node],
    *,
    given: Mapping[fx.Node | None, Any],
    values: dict[fx.Node, Tensor],
    call: _Call,
) -> Tensor:
    """The tensor of a node that a layer returned: an input of it, or one that the trace goes on with."""
    place = places[node]
    if place in given:
        passed: Tensor = given[place]
        return passed
    if place not in values:
        with disable_proxy_modes_tracing():
            made = torch.empty_strided(
                like.shape, like.stride(), dtype=like.dtype, device=like.device
            )
        proxy = fx.Proxy(place, call.tracer)
        values[place] = track_tensor_tree(made, proxy, constant=None, tracer=call.tracer)
    return values[place]
