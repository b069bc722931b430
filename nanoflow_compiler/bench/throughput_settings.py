"""Settings of ``nanoflow bench throughput``."""

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

__all__ = ["ThroughputSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputSettings:
    """Who answers."""

    backend: Annotated[
        Literal["nanoflow", "hf"], typer.Option(help="hf: generate of transformers.")
    ] = "nanoflow"
    hf_max_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts that hf pads to one length.")
    ] = None
    num_warmups: Annotated[
        int, typer.Option(min=0, help="Requests that are answered before the clock starts.")
    ] = 1
