"""Settings of ``nanoflow bench latency``."""

from dataclasses import dataclass
from typing import Annotated

import typer

__all__ = ["LatencySettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencySettings:
    """One batch, answered again and again; names and defaults are vLLM's."""

    input_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 32
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 128
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are asked at once.")] = 8
    num_iters_warmup: Annotated[int, typer.Option(min=0, help="Rounds that do not count.")] = 10
    num_iters: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 30
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0
