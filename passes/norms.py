"""norms: fx -> fx. An RMSNorm of what ``linear_add`` made becomes one operator, where a kernel serves it.

Consumes what ``epilogue`` made, the names of the placeholders that are parameters (``weights``) and
``serves``, which says of rows whether a kernel takes them. A norm behind an addition that is no longer
part of its cluster is alone there: as ``nanoflow.rms_norm`` it can chain with the products before and
behind it. All other norms stay in their clusters, which Inductor compiles.

Only where nobody else reads what lies between. The operator rounds as the nodes do, so that no output
changes. ``module.meta["notes"]`` and ``module.meta["fusions"]`` get what was fused. Belongs after
``epilogue`` and before ``axis``.
"""

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nanoflow_compiler import fused_ops
from nanoflow_compiler.graphs import call_nodes, operand, overload, shape_of
from nanoflow_compiler.passes.fuse import Fusion
from nanoflow_compiler.passes.products import Miss, behind_reshapes, last_reshape, replace_rows

__all__ = ["norms"]

aten = torch.ops.aten

Serves = Callable[[torch.Tensor], bool]


@dataclass(frozen=True, slots=True)
class _Norm:
    """``x * rsqrt(mean(x ** 2) + eps)``, times the weight, rounded before that or after."""

    rows: fx.Node
    """What ``linear_add`` made."""
    reshapes: list[fx.Node]
    weight: fx.Node
    eps: float
    rounds_last: bool
    result: fx.Node


def norms(module: fx.GraphModule, *, weights: AbstractSet[str], serves: Serves) -> fx.GraphModule:
    """Fuse where ``serves`` agrees; see the module's contract."""
    fusions: list[Fusion] = []
    for node in list(call_nodes(module)):
        norm = _norm(node, weights) if node.target is aten.rsqrt.default else None
        if norm is None or not serves(norm.rows.meta["val"]):
            continue
        arguments = (norm.rows, norm.weight, norm.eps, norm.rounds_last)
        reshape = last_reshape(norm.reshapes)
        try:
            made = replace_rows(norm.result, fused_ops.rms_norm, arguments, reshape=reshape)
        except Miss:
            continue
        fusions.append(Fusion("norm", (node.name, norm.result.name), made.name))
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.meta["fusions"] = [*module.meta.get("fusions", ()), *fusions]
    module.meta["notes"] = [*map(str, fusions)]
    module.recompile()
    return module


def _norm(rsqrt: fx.Node, weights: AbstractSet[str]) -> _Norm | None:
    scale = _scale(rsqrt)
    if scale is None:
        return None
    wide, eps, scaled = scale
    x = wide
    if overload(wide) is aten._to_copy and _is_cast(wide, torch.float32):
        x = operand(wide, 0)
        if len(wide.users) != 2:  # its square and its product
            return None
    source = behind_reshapes(x)
    if source is None or overload(source[0]) is not torch.ops.nanoflow.linear_add:
        return None
    weighted = _weighted(scaled, x.meta["val"].dtype, weights)
    if weighted is None or len(shape_of(source[0])) != 2:
        return None
    weight, rounds_last, result = weighted
    return _Norm(source[0], source[1], weight, eps, rounds_last, result)


def _scale(rsqrt: fx.Node) -> tuple[fx.Node, float, fx.Node] | None:
    """What is normed, in float32; its epsilon; and its product with the inverse root."""
    add: Any = rsqrt.args[0]
    mean: Any = add.args[0] if add.target is aten.add.Tensor and not add.kwargs else None
    if not isinstance(mean, fx.Node) or mean.target is not aten.mean.dim or mean.kwargs:
        return None
    square: Any = mean.args[0]
    squares = square.target is aten.pow.Tensor_Scalar and square.args[1] == 2
    rank = len(shape_of(square))
    if not squares or tuple(mean.args[1:]) not in (([-1], True), ([rank - 1], True)):
        return None
    wide, eps = square.args[0], add.args[1]
    scaled = _only_user(rsqrt)
    factors = {wide, rsqrt}
    if scaled is None or scaled.target is not aten.mul.Tensor or set(scaled.args) != factors:
        return None
    alone = all(len(node.users) == 1 for node in (square, mean, add))
    is_wide = wide.meta["val"].dtype is torch.float32 and isinstance(eps, float)
    return (wide, eps, scaled) if alone and is_wide else None


def _weighted(
    scaled: fx.Node, dtype: torch.dtype, weights: AbstractSet[str]
) -> tuple[fx.Node, bool, fx.Node] | None:
    """The weight, whether it is multiplied before the result is rounded, and the result."""
    node = scaled
    casts_first = dtype is not torch.float32 and _is_cast(_only_user(scaled), dtype)
    if casts_first:
        node = next(iter(scaled.users))
    product = _only_user(node)
    if product is None or product.target is not aten.mul.Tensor:
        return None
    others = [arg for arg in product.args if arg is not node]
    if len(others) != 1 or not _is_weight(others[0], dtype, scaled, weights):
        return None
    weight = others[0]
    assert isinstance(weight, fx.Node)
    if casts_first or dtype is torch.float32:
        return weight, False, product
    rounded = _only_user(product)
    return (weight, True, rounded) if rounded is not None and _is_cast(rounded, dtype) else None


def _is_weight(node: Any, dtype: torch.dtype, scaled: fx.Node, weights: AbstractSet[str]) -> bool:
    if not isinstance(node, fx.Node) or node.name not in weights:
        return False
    return node.meta["val"].dtype is dtype and shape_of(node) == shape_of(scaled)[-1:]


def _is_cast(node: fx.Node | None, dtype: torch.dtype) -> bool:
    """Whether a node changes the type to ``dtype`` and nothing else."""
    if node is None or overload(node) is not aten._to_copy:
        return False
    value, source = node.meta["val"], operand(node, 0).meta["val"]
    return value.dtype is dtype and value.device == source.device and value.layout == source.layout


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
