"""Any transformers causal LM, from a directory, a GGUF file, a hub id, an alias or the catalog.

An architecture whose attention does not go through transformers' interface has an adapter: one file with
``adapt(model)``, and one row in the table below. Adapters are imported when a model needs them.
"""

if __name__ != "nanoflow_compiler.models":
    raise ImportError(f"import nanoflow_compiler.models, not {__name__}: one copy only")

from importlib import import_module
from typing import Protocol, cast

from transformers import PreTrainedModel

from nanoflow_compiler.models.decoder import Decoder
from nanoflow_compiler.models.load import load_decoder
from nanoflow_compiler.models.locate import resolve_model

__all__ = ["ADAPTERS", "Adapter", "Decoder", "adapt", "load_decoder", "resolve_model"]

ADAPTERS = {
    "falcon": "nanoflow_compiler.models.falcon",
    "gptj": "nanoflow_compiler.models.gptj",
}
"""``model_type`` of a configuration -> module."""


class Adapter(Protocol):
    """What an adapter's module offers."""

    def adapt(self, model: PreTrainedModel) -> None:
        """Make the attention modules of ``model`` call transformers' interface in packed steps.

        Raises :class:`UnsupportedGraphError` for a variant that cannot be packed. Under transformers'
        own attention implementations ``model`` computes what it did before.
        """


def adapt(model: PreTrainedModel) -> None:
    """Apply the adapter of the architecture of ``model``, if it has one."""
    if name := ADAPTERS.get(model.config.model_type):
        cast("Adapter", import_module(name)).adapt(model)
