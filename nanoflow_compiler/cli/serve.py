"""``nanoflow serve``: answers over HTTP."""

import logging
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from nanoflow_compiler.cli.command import command
from nanoflow_compiler.cli.options import CompileFlags, Dtype, EngineFlags, Model, given
from nanoflow_compiler.errors import ConfigError

__all__ = ["serve"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFlags:
    """Settings of the HTTP server, as ``ServerSettings`` has them."""

    host: Annotated[str, typer.Option(help="Address; 0.0.0.0 is all of this machine's.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000
    api_key: Annotated[
        list[str] | None, typer.Option(help="Clients must send one of these; may be repeated.")
    ] = None
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Names that requests may use; may be repeated.")
    ] = None
    max_open_requests: Annotated[int | None, typer.Option(help="More are answered with 503.")] = (
        None
    )
    request_timeout_s: Annotated[float | None, typer.Option(help="Of a whole request.")] = None
    shutdown_timeout_s: Annotated[
        float | None, typer.Option(help="After SIGTERM, until requests are aborted.")
    ] = None
    allowed_origin: Annotated[list[str] | None, typer.Option(help="CORS; may be repeated.")] = None
    root_path: Annotated[str | None, typer.Option(help="Where a proxy shows the server.")] = None
    tool_call_parser: Annotated[
        str | None, typer.Option(help="auto, hermes, llama3_json or none.")
    ] = None
    disable_docs: Annotated[bool, typer.Option("--disable-docs", help="No /openapi.json.")] = False

    def settings(self) -> dict[str, Any]:
        """Fields of ``ServerSettings``; those that were not given are left out."""
        return given(
            host=self.host,
            port=self.port,
            api_keys=tuple(self.api_key or ()),
            served_model_names=tuple(self.served_model_name or ()),
            allowed_origins=tuple(self.allowed_origin or ()),
            max_open_requests=self.max_open_requests,
            request_timeout_s=self.request_timeout_s,
            shutdown_timeout_s=self.shutdown_timeout_s,
            root_path=self.root_path,
            tool_call_parser=self.tool_call_parser,
            disable_docs=self.disable_docs,
        )


@command
def serve(
    model: Model,
    *,
    server: ServerFlags,
    dtype: Dtype = "auto",
    engine: EngineFlags,
    seed: Annotated[int, typer.Option(help="For requests without one.")] = 0,
    compiler: CompileFlags,
) -> None:
    """Answer over HTTP, as OpenAI's API does."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        from nanoflow_compiler.serve import ServeConfig, serve_model
        from nanoflow_compiler.server.settings import ServerSettings
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is missing; install it with: pip install 'nanoflow-compiler[server]'"
        ) from error
    serve_model(
        ServeConfig(
            model=model,
            dtype=dtype,
            enforce_eager=compiler.enforce_eager,
            engine=engine.settings() | {"seed": seed},
            options=compiler.options(),
            server=ServerSettings(**server.settings()),
        )
    )
