"""Flags of the HTTP server; those of vLLM have vLLM's names."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from nanoflow_compiler.cli.config_file import read_config
from nanoflow_compiler.server.settings import ServerSettings

__all__ = ["ServerFlags"]

DEFAULT = ServerSettings()
PLURALS = {"api_key": "api_keys", "served_model_name": "served_model_names"}
"""Flags that may be repeated and are named in the singular."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFlags:
    """Fields of ``ServerSettings``."""

    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file; its keys are flags, and flags win.",
            callback=read_config,
            is_eager=True,
        ),
    ] = None
    host: Annotated[str, typer.Option(help="Address; 0.0.0.0 is all of this machine's.")] = (
        DEFAULT.host
    )
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = DEFAULT.port
    ssl_keyfile: Annotated[str | None, typer.Option(help="Key of --ssl-certfile.")] = None
    ssl_certfile: Annotated[str | None, typer.Option(help="Certificate; makes it HTTPS.")] = None
    ssl_ca_certs: Annotated[str | None, typer.Option(help="Who signs clients' ones.")] = None
    ssl_cert_reqs: Annotated[
        int, typer.Option(help="Certificates of clients: 0 none, 1 optional, 2 required.")
    ] = DEFAULT.ssl_cert_reqs
    root_path: Annotated[str, typer.Option(help="Where a proxy shows the server.")] = (
        DEFAULT.root_path
    )
    api_key: Annotated[
        list[str] | None, typer.Option(help="Clients must send one of these; may be several.")
    ] = None
    allowed_origins: Annotated[list[str] | None, typer.Option(help="CORS; * is all.")] = None
    allowed_methods: Annotated[list[str] | None, typer.Option(help="CORS; default: all.")] = None
    allowed_headers: Annotated[list[str] | None, typer.Option(help="CORS; default: all.")] = None
    allow_credentials: Annotated[
        bool, typer.Option("--allow-credentials", help="CORS: browsers may send cookies.")
    ] = DEFAULT.allow_credentials
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Names that requests may use; may be several.")
    ] = None
    chat_template: Annotated[
        str | None, typer.Option(help="File, or Jinja text, in place of the tokenizer's.")
    ] = None
    tool_call_parser: Annotated[
        str, typer.Option(help="auto, hermes, llama3_json or none; auto asks the template.")
    ] = DEFAULT.tool_call_parser
    enable_auto_tool_choice: Annotated[
        bool | None, typer.Option(help="The model may decide to call tools; default: if it can.")
    ] = None
    generation_config: Annotated[
        str, typer.Option(help="auto: defaults of requests are the model's; vllm: they are not.")
    ] = DEFAULT.generation_config
    max_request_bytes: Annotated[int, typer.Option(help="Larger bodies get a 413.")] = (
        DEFAULT.max_request_bytes
    )
    max_num_queued_reqs: Annotated[
        int, typer.Option(help="Running and waiting; more get a 503.")
    ] = DEFAULT.max_num_queued_reqs
    max_num_queued_tokens: Annotated[
        int | None, typer.Option(help="Of prompts without a first token; then a 503.")
    ] = None
    request_timeout: Annotated[float | None, typer.Option(help="Seconds of a whole request.")] = (
        None
    )
    shutdown_timeout: Annotated[
        float, typer.Option(help="Seconds after SIGTERM, until requests are aborted.")
    ] = DEFAULT.shutdown_timeout
    stream_interval: Annotated[int, typer.Option(help="Tokens in a chunk of a stream.")] = (
        DEFAULT.stream_interval
    )
    enable_log_requests: Annotated[bool, typer.Option(help="A line for each that ended.")] = (
        DEFAULT.enable_log_requests
    )
    disable_log_stats: Annotated[
        bool, typer.Option("--disable-log-stats", help="No line every ten seconds.")
    ] = DEFAULT.disable_log_stats
    uvicorn_log_level: Annotated[str, typer.Option(help="trace to critical.")] = (
        DEFAULT.uvicorn_log_level
    )
    metrics_prefix: Annotated[str, typer.Option(help="vllm suits its dashboards.")] = (
        DEFAULT.metrics_prefix
    )
    disable_fastapi_docs: Annotated[
        bool, typer.Option("--disable-fastapi-docs", help="No /openapi.json.")
    ] = DEFAULT.disable_fastapi_docs

    def settings(self) -> dict[str, Any]:
        """Fields of ``ServerSettings``; those that were not given are left out."""
        found: dict[str, Any] = {}
        for name in (field.name for field in fields(self) if field.name != "config"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                value = _unpacked(value) or None
            if value is not None:
                found[PLURALS.get(name, name)] = value
        return found


def _unpacked(values: Sequence[str]) -> tuple[str, ...]:
    """vLLM takes lists of origins as JSON."""
    found: list[str] = []
    for value in values:
        found += json.loads(value) if value.startswith("[") else [value]
    return tuple(found)
