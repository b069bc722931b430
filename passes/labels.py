"""What a person calls an operation."""

from torch import fx

from nanoflow_compiler.graphs import overload
from nanoflow_compiler.ir import OpKind
from nanoflow_compiler.passes.grouping import Group, is_view

__all__ = ["label_of"]

_SHOWN = 3


def label_of(group: Group) -> str:
    """``"add + rms_norm"`` for a cluster, ``"mm [576, 960]"`` for a product."""
    if group.kind is OpKind.GEMM:
        return _product_label(group.nodes[0])
    if group.kind not in (OpKind.CLUSTER, OpKind.OTHER):
        return ""
    names = [_part_name(node) for node in group.nodes if not is_view(node)]
    distinct = list(dict.fromkeys(name for name in names if name))
    if len(distinct) > _SHOWN:
        patterns = [name for name in distinct if name in _patterns(group)]
        distinct = patterns or [*distinct[:_SHOWN], "..."]
    return " + ".join(distinct)


def _product_label(node: fx.Node) -> str:
    shapes = [arg.meta["val"].shape for arg in node.args if isinstance(arg, fx.Node)]
    matrices = [shape for shape in shapes if len(shape) > 1]  # not the bias, which may be last
    right = ", ".join(map(str, (matrices or shapes)[-1]))
    return f"{overload(node).__name__} [{right}]"


def _part_name(node: fx.Node) -> str:
    return _pattern(node) or str(getattr(overload(node), "__name__", node.target))


def _pattern(node: fx.Node) -> str:
    return str(node.meta.get("pattern", "")).partition(":")[0]


def _patterns(group: Group) -> set[str]:
    return {_pattern(node) for node in group.nodes} - {""}
