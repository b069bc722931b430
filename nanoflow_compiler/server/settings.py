"""Frozen settings of the server; names are vLLM's where the meaning is the same."""

import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from nanoflow_compiler.errors import ConfigError

__all__ = ["LogLevel", "ServerSettings", "ToolCallParser"]

PREFIX = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
ToolCallParser = Literal["auto", "hermes", "llama3_json", "none"]
LogLevel = Literal["critical", "error", "warning", "info", "debug", "trace"]

AT_LEAST_ONE = (
    "max_request_bytes",
    "max_num_queued_reqs",
    "max_num_queued_tokens",
    "stream_interval",
)
GenerationConfig = Literal["auto", "vllm"]
CHOICES = {
    "generation_config": GenerationConfig,
    "tool_call_parser": ToolCallParser,
    "uvicorn_log_level": LogLevel,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Raises :class:`ConfigError` on construction when a value cannot be used."""

    host: str = "127.0.0.1"
    """Only this machine: without an API key, a wider address lets anyone in."""
    port: int = 8000
    """0 takes a free one."""
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    """With a certificate, the server speaks HTTPS."""
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = int(ssl.CERT_NONE)
    """Of clients, as Python's module ``ssl`` has it: 0 none, 1 optional, 2 required."""
    root_path: str = ""
    """Where a proxy shows this server, such as ``/llm``."""
    api_keys: tuple[str, ...] = ()
    """Any of these opens the server; with none, it is open."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of browsers (CORS); ``("*",)`` is all of them."""
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    """Browsers may send cookies."""
    served_model_names: tuple[str, ...] = ()
    """Names that requests may use, the first one in answers; by default the engine's."""
    chat_template: str | None = None
    """A file, or Jinja text, in place of the tokenizer's template."""
    tool_call_parser: ToolCallParser = "auto"
    """How tool calls look in the output; ``auto`` asks the chat template."""
    enable_auto_tool_choice: bool | None = None
    """Whether a model may decide to call a tool. ``None``: if the format of its calls is known."""
    generation_config: GenerationConfig = "auto"
    """``auto``: requests without a temperature, and so on, have what the model recommends."""
    max_request_bytes: int = 8 << 20
    max_num_queued_reqs: int = 4096
    """Prompts, times ``n``, that may run and wait at the same time; more are answered with 503."""
    max_num_queued_tokens: int | None = None
    """While prompts without a first token hold so many together, new requests get a 503."""
    request_timeout: float | None = None
    """Seconds of a whole request, from its arrival to its last byte; ``None`` is no limit."""
    shutdown_timeout: float = 30.0
    """After SIGTERM, open requests have so many seconds to end; then they are aborted."""
    stream_interval: int = 1
    """Tokens in each chunk of a stream but the first and the last; more cost the server less."""
    enable_log_requests: bool = True
    """A line for each prompt that ended."""
    disable_log_stats: bool = False
    """Without it, a busy server says every ten seconds what it does."""
    uvicorn_log_level: LogLevel = "info"
    metrics_prefix: str = "nanoflow"
    """``vllm`` suits dashboards that were made for vLLM."""
    disable_fastapi_docs: bool = False
    """Serve neither ``/openapi.json`` nor ``/docs``."""

    def __post_init__(self) -> None:
        """Refuse what could not serve."""
        _check(0 <= self.port < 65536, f"port must be from 0 to 65535, not {self.port}")
        _check(all(self.api_keys), "api_keys holds an empty key; leave it out")
        _check(
            not self.root_path or self.root_path.startswith("/"),
            f"root_path must begin with a slash, not {self.root_path!r}",
        )
        _check(
            PREFIX.fullmatch(self.metrics_prefix) is not None,
            f"metrics_prefix must be letters, digits and underscores, not {self.metrics_prefix!r}",
        )
        for name, choices in CHOICES.items():
            listed, value = get_args(choices), getattr(self, name)
            _check(value in listed, f"{name} must be one of {', '.join(listed)}, not {value!r}")
        self._check_limits()
        self._check_ssl()
        self.read_chat_template()

    def read_chat_template(self) -> str | None:
        """The text, whether it was given itself or by its file."""
        given = self.chat_template
        if given is None or "{{" in given or "{%" in given:
            return given
        try:
            return Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"chat_template {given!r} is no Jinja text, and as a file it cannot be read: {error}"
            ) from error

    def _check_limits(self) -> None:
        for name in AT_LEAST_ONE:
            count = getattr(self, name)
            _check(count is None or count >= 1, f"{name} must be at least 1, not {count}")
        limit = self.request_timeout
        _check(limit is None or limit > 0, f"request_timeout must be above 0, not {limit}")
        limit = self.shutdown_timeout
        _check(limit >= 0, f"shutdown_timeout must be 0 or more, not {limit}")

    def _check_ssl(self) -> None:
        _check(
            self.ssl_certfile is not None or self.ssl_keyfile is None,
            "ssl_keyfile needs ssl_certfile, the certificate of this key",
        )
        for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
            path = getattr(self, name)
            _check(path is None or Path(path).is_file(), f"{name}: there is no file {path}")
        _check(
            self.ssl_cert_reqs in (0, 1, 2),
            f"ssl_cert_reqs must be 0, 1 or 2, not {self.ssl_cert_reqs}",
        )


def _check(is_good: bool, message: str) -> None:
    if not is_good:
        raise ConfigError(message)
