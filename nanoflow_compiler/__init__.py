"""A graph compiler that serves decoder LLMs: ``torch.compile(model, backend="nanoflow")``."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.errors import (
    CaptureError,
    ConfigError,
    EmptyPromptError,
    EngineClosedError,
    EngineDeadError,
    InvalidProgramError,
    ModelLoadError,
    NanoflowError,
    OutOfBlocksError,
    PromptTooLongError,
    RequestError,
    UnsupportedGraphError,
)

if TYPE_CHECKING:
    from torch import fx

    from nanoflow_compiler.engine.async_engine import AsyncEngine as AsyncEngine
    from nanoflow_compiler.engine.engine_config import EngineConfig as EngineConfig
    from nanoflow_compiler.engine.llm import LLM as LLM
    from nanoflow_compiler.engine.sampling_params import SamplingParams as SamplingParams
    from nanoflow_compiler.engine.spec import EngineSpec as EngineSpec
    from nanoflow_compiler.engine.structured import (
        StructuredOutputsParams as StructuredOutputsParams,
    )

__all__ = [
    "LLM",
    "AsyncEngine",
    "CaptureError",
    "CompileConfig",
    "ConfigError",
    "EmptyPromptError",
    "EngineClosedError",
    "EngineConfig",
    "EngineDeadError",
    "EngineSpec",
    "InvalidProgramError",
    "ModelLoadError",
    "NanoflowError",
    "OutOfBlocksError",
    "PromptTooLongError",
    "RequestError",
    "SamplingParams",
    "StructuredOutputsParams",
    "UnsupportedGraphError",
    "nanoflow",
]

__version__ = "0.1.0"

_LAZY = {
    "AsyncEngine": "nanoflow_compiler.engine.async_engine",
    "EngineConfig": "nanoflow_compiler.engine.engine_config",
    "EngineSpec": "nanoflow_compiler.engine.spec",
    "LLM": "nanoflow_compiler.engine.llm",
    "SamplingParams": "nanoflow_compiler.engine.sampling_params",
    "StructuredOutputsParams": "nanoflow_compiler.engine.structured",
}


def nanoflow(
    module: "fx.GraphModule",
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Callable[..., Any]:
    """The backend that ``torch.compile(model, backend="nanoflow", options={...})`` finds.

    ``options`` are the fields of :class:`CompileConfig`.
    """
    from nanoflow_compiler.compiler import compile_dynamo_graph

    return compile_dynamo_graph(module, example_inputs, mode=mode, options=options)


def __getattr__(name: str) -> Any:
    """The engine is imported when it is first asked for."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
