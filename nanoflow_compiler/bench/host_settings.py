"""Settings of ``nanoflow bench host``."""

from dataclasses import dataclass
from typing import Annotated

import typer

__all__ = ["HostSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSettings:
    """How much runs, and on what device."""

    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 1024
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of one step; default: twice as many.")
    ] = None
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 512
    num_steps: Annotated[int, typer.Option(min=2, help="Steps that are measured.")] = 200
    step_time_ms: Annotated[float, typer.Option(min=0, help="What a step takes on the device.")] = (
        20.0
    )
    parts: Annotated[int, typer.Option(min=1, help="Parts of the program of a step.")] = 1
    enable_prefix_caching: Annotated[
        bool, typer.Option(help="Name blocks, so that prompts that begin alike share them.")
    ] = True
    seed: Annotated[int, typer.Option(help="Of prompts, and of when the first answers end.")] = 0

    @property
    def budget(self) -> int:
        """The token budget; twice ``max_num_seqs`` leaves as much for prompts as for decode."""
        return self.max_num_batched_tokens or 2 * self.max_num_seqs
