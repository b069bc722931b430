"""Sampling settings of the requests of a benchmark."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

__all__ = ["BenchSampling"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSampling:
    """What is not given is left to the engine, or to the server."""

    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None
    top_k: Annotated[int | None, typer.Option(help="Sample from so many tokens.")] = None
    top_p: Annotated[float | None, typer.Option(help="Sample from this much probability.")] = None
    min_p: Annotated[float | None, typer.Option(help="Relative to the likeliest token.")] = None
    presence_penalty: Annotated[float | None, typer.Option(help="As SamplingParams.")] = None
    frequency_penalty: Annotated[float | None, typer.Option(help="As SamplingParams.")] = None
    repetition_penalty: Annotated[float | None, typer.Option(help="As SamplingParams.")] = None
    logprobs: Annotated[int | None, typer.Option(help="Of so many likely tokens.")] = None

    def given(self) -> dict[str, Any]:
        """Those that were given."""
        return {name: value for name, value in asdict(self).items() if value is not None}
