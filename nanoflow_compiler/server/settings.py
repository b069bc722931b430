"""Frozen settings of the server; names are vLLM's where the meaning is the same."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from nanoflow_compiler.errors import ConfigError

__all__ = ["ServerSettings", "ToolCallParser"]

PREFIX = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
ToolCallParser = Literal["auto", "hermes", "llama3_json", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Raises :class:`ConfigError` on construction when a value cannot be used."""

    host: str = "127.0.0.1"
    """Only this machine: without an API key, a wider address lets anyone in."""
    port: int = 8000
    """0 takes a free one."""
    api_keys: tuple[str, ...] = ()
    """Any of these opens the server; with none, it is open."""
    served_model_names: tuple[str, ...] = ()
    """Names that requests may use, the first one in answers; by default the engine's."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of browsers (CORS); ``("*",)`` is all of them."""
    max_request_bytes: int = 8 << 20
    max_open_requests: int = 4096
    """Prompts, times ``n``, that may run and wait at the same time; more are answered with 503."""
    request_timeout_s: float | None = None
    """Of a whole request, from its arrival to its last byte; ``None`` is no limit."""
    shutdown_timeout_s: float = 30.0
    """After SIGTERM, open requests have this long to end; then they are aborted."""
    root_path: str = ""
    """Where a proxy shows this server, such as ``/llm``."""
    chat_template: str | None = None
    """Jinja text that replaces the tokenizer's template."""
    stream_interval: int = 1
    """Tokens in each chunk of a stream but the first and the last; more cost the server less."""
    tool_call_parser: ToolCallParser = "auto"
    """How tool calls look in the output; ``auto`` asks the chat template."""
    metrics_prefix: str = "nanoflow"
    """``vllm`` suits dashboards that were made for vLLM."""
    disable_docs: bool = False
    """Serve neither ``/openapi.json`` nor ``/docs``."""

    def __post_init__(self) -> None:
        """Refuse what could not serve."""
        _check(0 <= self.port < 65536, f"port must be from 0 to 65535, not {self.port}")
        for name in ("max_request_bytes", "max_open_requests", "stream_interval"):
            count = getattr(self, name)
            _check(count >= 1, f"{name} must be at least 1, not {count}")
        limit = self.request_timeout_s
        _check(limit is None or limit > 0, f"request_timeout_s must be above 0, not {limit}")
        _check(
            self.shutdown_timeout_s >= 0,
            f"shutdown_timeout_s must be 0 or more, not {self.shutdown_timeout_s}",
        )
        _check(all(self.api_keys), "api_keys holds an empty key; leave it out")
        _check(
            not self.root_path or self.root_path.startswith("/"),
            f"root_path must begin with a slash, not {self.root_path!r}",
        )
        _check(
            PREFIX.fullmatch(self.metrics_prefix) is not None,
            f"metrics_prefix must be letters, digits and underscores, not {self.metrics_prefix!r}",
        )
        parsers = get_args(ToolCallParser)
        _check(
            self.tool_call_parser in parsers,
            f"tool_call_parser must be one of {', '.join(parsers)}, not {self.tool_call_parser!r}",
        )


def _check(is_good: bool, message: str) -> None:
    if not is_good:
        raise ConfigError(message)
