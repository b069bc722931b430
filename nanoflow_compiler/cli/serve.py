"""``nanoflow serve``: answers over HTTP."""

import logging
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Annotated, Literal

import typer

from nanoflow_compiler.cli.command import command
from nanoflow_compiler.cli.options import (
    CompileFlags,
    Device,
    Dtype,
    DummyDistributionFlag,
    EngineFlags,
    HfOverrides,
    Model,
)
from nanoflow_compiler.cli.server_flags import ServerFlags
from nanoflow_compiler.engine.engine_process import EngineProcess
from nanoflow_compiler.errors import ConfigError

__all__ = ["serve"]


@command
def serve(
    model: Model,
    *,
    server: ServerFlags,
    tokenizer: Annotated[str | None, typer.Option(help="Of another model.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    load_format: Annotated[
        Literal["auto", "dummy"], typer.Option(help="auto, or dummy: random weights.")
    ] = "auto",
    dummy_distribution: DummyDistributionFlag = "normal",
    hf_overrides: HfOverrides = None,
    engine: EngineFlags,
    seed: Annotated[int, typer.Option(help="For requests without one.")] = 0,
    compiler: CompileFlags,
    max_engine_restarts: Annotated[
        int, typer.Option(min=0, help="Of an engine that died; its requests are lost.")
    ] = 0,
) -> None:
    """Answer over HTTP, as OpenAI's API does."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    # Without the extra there is nothing to start, and what is missing is said below.
    with EngineProcess.early() if find_spec("zmq") else nullcontext() as early:
        try:
            from nanoflow_compiler.engine.engine_config import EngineConfig
            from nanoflow_compiler.engine.spec import EngineSpec
            from nanoflow_compiler.serve import ServeConfig, serve_model
            from nanoflow_compiler.server.settings import ServerSettings
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{error.name} is missing; install it with: pip install 'nanoflow-compiler[server]'"
            ) from error
        serve_model(
            ServeConfig(
                engine=EngineSpec(
                    model=model,
                    tokenizer=tokenizer,
                    dtype=dtype,
                    device=device,
                    load_format=load_format,
                    dummy_distribution=dummy_distribution,
                    hf_overrides=hf_overrides,
                    config=EngineConfig(**engine.settings(), seed=seed),
                    enforce_eager=compiler.enforce_eager,
                    options=compiler.options(),
                ),
                server=ServerSettings(**server.settings()),
                max_engine_restarts=max_engine_restarts,
            ),
            early=early,
        )
