"""Settings of ``nanoflow bench throughput``."""

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

__all__ = ["ThroughputSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputSettings:
    """Who answers, and what is measured beside the time."""

    backend: Annotated[
        Literal["nanoflow", "hf"], typer.Option(help="hf: generate of transformers.")
    ] = "nanoflow"
    hf_max_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts that hf pads to one length.")
    ] = None
    num_warmups: Annotated[
        int, typer.Option(min=0, help="Requests that are answered before the clock starts.")
    ] = 1
    temperature: Annotated[float, typer.Option(min=0, help="Of the answers; 0 is greedy.")] = 1.0
    wall: Annotated[
        bool,
        typer.Option("--wall", help="Also what the model's GEMMs and attention allow, on a GPU."),
    ] = False
