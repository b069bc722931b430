"""The GEMMs of a model, by shape, as an engine would run them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from nanoflow_compiler.errors import ConfigError

__all__ = ["Gemm", "list_gemms"]

MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears of one module that read the same input under these names: as one GEMM they are faster."""


@dataclass(frozen=True, slots=True)
class Gemm:
    """``[rows, in_features] @ [in_features, out_features]``."""

    name: str
    in_features: int
    out_features: int

    @property
    def num_weights(self) -> int:
        """Of one of them."""
        return self.in_features * self.out_features


def list_gemms(model: PreTrainedModel) -> tuple[dict[Gemm, int], Gemm]:
    """How many of each the layers have, and the LM head.

    Raises :class:`ConfigError` for a model with weights that are in no linear, such as experts.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigError(f"{type(model).__name__} has no linear LM head: its wall is not known")
    gemms = Counter(gemm for module in model.modules() for gemm in _of_module(module, head))
    _check_complete(model, gemms, head)
    return dict(gemms), Gemm("lm_head", head.in_features, head.out_features)


def _of_module(module: nn.Module, head: nn.Module) -> Iterator[Gemm]:
    linears = {
        name: child
        for name, child in module.named_children()
        if isinstance(child, nn.Linear) and child is not head
    }
    for names in MERGED:
        if all(name in linears for name in names):
            group = [linears.pop(name) for name in names]
            width = sum(linear.out_features for linear in group)
            yield Gemm("+".join(names), group[0].in_features, width)
    for name, linear in linears.items():
        yield Gemm(name, linear.in_features, linear.out_features)


def _check_complete(model: PreTrainedModel, gemms: Counter[Gemm], head: nn.Linear) -> None:
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = [p for p in model.parameters() if p.dim() > 1 and p not in tables | {head.weight}]
    known = sum(gemm.num_weights * count for gemm, count in gemms.items())
    if sum(matrix.numel() for matrix in matrices) != known:
        raise ConfigError(
            f"{type(model).__name__} has weights that are in no linear, such as experts: its wall is "
            "not known; leave --wall out"
        )
