"""Any transformers causal LM, from a directory, a GGUF file, a hub id, an alias or the catalog."""

if __name__ != "nanoflow_compiler.models":
    raise ImportError(f"import nanoflow_compiler.models, not {__name__}: one copy only")

from nanoflow_compiler.models.decoder import Decoder
from nanoflow_compiler.models.load import load_decoder
from nanoflow_compiler.models.locate import resolve_model

__all__ = ["Decoder", "load_decoder", "resolve_model"]
