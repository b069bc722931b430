"""Which model a benchmark loads, and where."""

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer

from nanoflow_compiler.errors import ConfigError

__all__ = ["Device", "DummyDistributionFlag", "HfOverrides", "ModelSettings", "json_object"]

Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda or cuda:N; auto: a GPU if there is one.")
]
DummyDistributionFlag = Annotated[
    Literal["normal", "uniform"],
    typer.Option(help="Of dummy weights: as training begins, or up to 0.001 as vLLM has them."),
]


def json_object(given: str | dict[str, Any]) -> dict[str, Any]:
    """Parses a flag; a file of flags may hold the mapping itself."""
    try:
        values = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError:
        values = None
    if not isinstance(values, dict):
        raise typer.BadParameter(f'{given!r} is no JSON object, such as {{"name": 2}}')
    return values


HfOverrides = Annotated[
    dict[str, Any] | None,
    typer.Option(
        parser=json_object, metavar="JSON", help="Replace values of the model's config.json."
    ),
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
    hf_overrides: HfOverrides = None

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
            "hf_overrides": self.hf_overrides,
        }
