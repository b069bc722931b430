"""Which model a benchmark loads, and where."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer

from nanoflow_compiler.errors import ConfigError

__all__ = ["Device", "DummyDistributionFlag", "ModelSettings"]

Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda or cuda:N; auto: a GPU if there is one.")
]
DummyDistributionFlag = Annotated[
    Literal["normal", "uniform"],
    typer.Option(help="Of dummy weights: as training begins, or up to 0.001 as vLLM has them."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """How it is named, and what of it is loaded."""

    model: Annotated[
        str | None,
        typer.Option(help="Directory, .gguf file, hub id, or an alias such as smollm2-135m."),
    ] = None
    dummy_weights: Annotated[
        str | None, typer.Option(help="As --model with --load-format dummy.")
    ] = None
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"
    device: Device = "auto"
    load_format: Annotated[
        Literal["auto", "dummy"], typer.Option(help="dummy: random weights.")
    ] = "auto"
    dummy_distribution: DummyDistributionFlag = "normal"

    @property
    def name(self) -> str:
        """Of the one model; ConfigError if there is none, or two."""
        if self.model and self.dummy_weights:
            raise ConfigError("--dummy-weights NAME stands for --model NAME --load-format dummy")
        name = self.model or self.dummy_weights
        if not name:
            raise ConfigError("no model; pass --model NAME, or --dummy-weights NAME")
        return name

    def loading(self) -> dict[str, Any]:
        """Arguments of ``LLM`` and ``load_decoder`` beside the name."""
        return {
            "dtype": self.dtype,
            "device": self.device,
            "load_format": "dummy" if self.dummy_weights else self.load_format,
            "dummy_distribution": self.dummy_distribution,
        }
