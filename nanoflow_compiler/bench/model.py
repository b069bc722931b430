"""Which model a benchmark loads."""

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

__all__ = ["ModelSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """How it is named, and what of it is loaded."""

    model: Annotated[
        str, typer.Option(help="Directory, .gguf file, hub id, or an alias such as smollm2-135m.")
    ]
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"
    load_format: Annotated[
        Literal["auto", "dummy"], typer.Option(help="dummy: random weights.")
    ] = "auto"
