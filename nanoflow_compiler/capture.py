"""One packed step of a decoder as an ATen graph, with every weight an input of it.

Traced without Dynamo: a decoder is called with fake tensors once, and ``make_fx`` records what it
does. Dynamo would analyse bytecode to guard what it assumes; a step is captured for good, so it has
no guards, and the trace is five times faster, sees models that Dynamo cannot, and knows the names
of the weights. What the trace does assume, a condition on sizes, is refused here.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.nn.utils.stateless import _reparametrize_module

from nanoflow_compiler.errors import NanoflowError, UnsupportedGraphError
from nanoflow_compiler.graphs import call_nodes
from nanoflow_compiler.models.hf import PackedDecoder
from nanoflow_compiler.naming import name_placeholders
from nanoflow_compiler.pipeline import CapturedGraph
from nanoflow_compiler.repeats import LayerRepeats

__all__ = ["NUM_GIVEN", "PLANNED_TOKENS", "capture_step", "step_arguments", "weights_of"]

PLANNED_TOKENS = 512
"""Tokens that plans are estimated for, where nothing else is said."""
_TRACED_ROWS = 64
_GIVEN = ("num_tokens", "num_rows", "input_ids", "positions", "rows")
NUM_GIVEN = len(_GIVEN)
"""Placeholders before those of the weights."""


@dataclass(frozen=True, slots=True)
class _Traced:
    module: fx.GraphModule
    shapes: ShapeEnv


def step_arguments(input_ids: Tensor, positions: Tensor, rows: Tensor) -> list[Any]:
    """What a captured graph is given in each call, before its weights."""
    # Sizes come first: whatever has the size of a placeholder is then spelled as that placeholder.
    return [input_ids.shape[0], rows.shape[0], input_ids, positions, rows]


def weights_of(packed: PackedDecoder) -> list[Tensor]:
    """Parameters and buffers, in the order of their placeholders."""
    return [*_named_weights(packed).values()]


def _named_weights(packed: PackedDecoder) -> dict[str, Tensor]:
    return dict(packed.named_parameters()) | dict(packed.named_buffers())


def capture_step(packed: PackedDecoder, *, tokens: int = PLANNED_TOKENS) -> CapturedGraph:
    """Trace one step of ``tokens`` tokens; nothing is computed.

    Placeholders are those of :func:`step_arguments`, then those of :func:`weights_of`.
    Raises :class:`UnsupportedGraphError` for a model that reads values of tensors in Python, or
    that takes a different path for different numbers of tokens.
    """
    weights = _named_weights(packed)
    try:
        traced = _trace(packed, weights, tokens=tokens)
    except NanoflowError:
        raise
    except Exception as error:
        raise _refused(packed, str(error).strip().partition("\n")[0]) from error
    if guards := traced.shapes.guards:
        branches = ", ".join(sorted({str(guard.expr) for guard in guards}))
        raise _refused(packed, f"it depends on the number of tokens ({branches})")
    wanted = [*_GIVEN, *(re.sub(r"\W", "_", name.removeprefix("model.")) for name in weights)]
    names = name_placeholders(traced.module, wanted)[NUM_GIVEN:]
    parameters = (n for n, w in zip(names, weights.values(), strict=True) if _is_parameter(w))
    seeds = (("input_ids", 0), ("positions", 0))
    return CapturedGraph(traced.module, tuple(parameters), seeds, tokens)


def _refused(packed: PackedDecoder, why: str) -> UnsupportedGraphError:
    name = type(packed.model).__name__
    return UnsupportedGraphError(
        f"{name} cannot be captured as one graph: {why}; enforce_eager=True runs it uncompiled"
    )


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


def _trace(packed: PackedDecoder, weights: dict[str, Tensor], *, tokens: int) -> _Traced:
    """Functional; what decides that is the plain trace, which most decoders get by with."""
    repeats = LayerRepeats()
    with repeats.of(packed):
        traced = _trace_once(packed, weights, tokens=tokens, functional=False)
    if not repeats.is_sound:
        traced = _trace_once(packed, weights, tokens=tokens, functional=False)
    if any(map(_is_write, call_nodes(traced.module))):
        traced = _trace_once(packed, weights, tokens=tokens, functional=True)
    return traced


def _is_write(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _trace_once(
    packed: PackedDecoder, weights: dict[str, Tensor], *, tokens: int, functional: bool
) -> _Traced:
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    fakes = {name: mode.from_tensor(w, static_shapes=True) for name, w in weights.items()}
    num_tokens, num_rows = _size(shapes, "tokens", tokens), _size(shapes, "rows", _TRACED_ROWS)

    def run(_: Any, __: Any, ids: Tensor, positions: Tensor, rows: Tensor, *values: Tensor) -> Any:
        own = dict(zip(weights, values, strict=True))
        with _reparametrize_module(packed, own, tie_weights=True):
            return (packed(ids, positions, rows),)

    traced = dispatch_functionalize(run, FunctionalTensorMode()) if functional else run
    with torch.no_grad(), mode, enable_python_dispatcher():
        integers = [
            torch.empty(size, dtype=torch.int64, device=packed.device)
            for size in (num_tokens, num_tokens, num_rows)
        ]
        module = make_fx(traced)(num_tokens, num_rows, *integers, *fakes.values())
    return _Traced(module, shapes)


def _size(shapes: ShapeEnv, name: str, hint: int) -> Any:
    source = ConstantSource(f"num_{name}")
    symbol = shapes.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    return shapes.create_symintnode(symbol, hint=hint, source=source)
