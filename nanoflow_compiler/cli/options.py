"""Flags that several commands share."""

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from nanoflow_compiler.bench.model import Device, DummyDistributionFlag, HfOverrides, json_object

__all__ = [
    "CompileFlags",
    "Device",
    "Dtype",
    "DummyDistributionFlag",
    "EngineFlags",
    "HfOverrides",
    "Model",
    "SamplingFlags",
    "StepFlags",
    "given",
]

Model = Annotated[
    str, typer.Argument(help="Directory, .gguf file, hub id, or an alias such as smollm2-135m.")
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]


def given(**settings: object) -> dict[str, Any]:
    """What the user set: the rest keeps the defaults of the engine and the compiler."""
    return {name: value for name, value in settings.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFlags:
    """Fields of ``SamplingParams``."""

    max_tokens: Annotated[int, typer.Option(help="Most tokens of each answer.")] = 128
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0
    top_k: Annotated[int, typer.Option(help="Sample from so many tokens; 0: all.")] = 0
    top_p: Annotated[float, typer.Option(help="Sample from this much probability.")] = 1.0
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFlags:
    """Sizes of the engine, as ``EngineConfig`` names them."""

    max_model_len: Annotated[int | None, typer.Option(help="Prompt and answer, tokens.")] = None
    max_num_seqs: Annotated[int | None, typer.Option(help="Requests at the same time.")] = None
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens of one step; longer prompts take several.")
    ] = None
    num_kv_blocks: Annotated[int | None, typer.Option(help="KV blocks of 64 tokens.")] = None
    kv_cache_memory_bytes: Annotated[int | None, typer.Option(help="Bytes of KV cache.")] = None
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="Fraction of the GPU's memory to use.")
    ] = None
    enable_prefix_caching: Annotated[
        bool | None, typer.Option(help="Keep blocks for prompts that begin alike.")
    ] = None

    def settings(self) -> dict[str, Any]:
        """Those that were given."""
        return given(
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            num_kv_blocks=self.num_kv_blocks,
            kv_cache_memory_bytes=self.kv_cache_memory_bytes,
            gpu_memory_utilization=self.gpu_memory_utilization,
            enable_prefix_caching=self.enable_prefix_caching,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFlags:
    """How a step of the model is made, or that it is not compiled."""

    enforce_eager: Annotated[
        bool, typer.Option("--enforce-eager", help="Do not compile; for comparison.")
    ] = False
    parts: Annotated[
        str | None, typer.Option(help="Nano-batches of each operation, or auto, as without it.")
    ] = None
    compile_options: Annotated[
        dict[str, Any] | None,
        typer.Option(
            parser=json_object, metavar="JSON", help='Further options, such as {"fuse": false}.'
        ),
    ] = None

    def options(self) -> dict[str, Any]:
        """Fields of ``CompileConfig``; a flag of its own wins over ``compile_options``."""
        parts = int(self.parts) if self.parts and self.parts.isdecimal() else self.parts
        return (self.compile_options or {}) | given(parts=parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileFlags(StepFlags):
    """The same, and what runs the program."""

    backend: Annotated[
        str | None, typer.Option(help="auto, codegen, streams, cuda_graph or reference.")
    ] = None

    def options(self) -> dict[str, Any]:
        """Fields of ``CompileConfig``; a flag of its own wins over ``compile_options``."""
        return StepFlags.options(self) | given(backend=self.backend)
