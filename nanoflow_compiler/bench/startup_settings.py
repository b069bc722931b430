"""Settings of ``nanoflow bench startup``."""

from dataclasses import dataclass
from typing import Annotated

import typer

__all__ = ["StartupSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartupSettings:
    """How often; names and defaults are vLLM's."""

    num_iters_cold: Annotated[int, typer.Option(min=1, help="Starts with empty caches.")] = 3
    num_iters_warm: Annotated[
        int, typer.Option(min=0, help="Starts with the caches of the last cold one.")
    ] = 3
    server: Annotated[
        bool, typer.Option("--server", help="Of nanoflow serve, to a first token over HTTP.")
    ] = False
