"""Settings of ``nanoflow bench serve``."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from math import inf, isinf
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nanoflow_compiler.errors import ConfigError

__all__ = ["METRICS", "ServeSettings"]

METRICS = ("ttft", "tpot", "itl", "e2el")
ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Which server, how requests come, and what is told; names are vLLM's."""

    base_url: Annotated[str | None, typer.Option(help="Instead of host and port.")] = None
    host: Annotated[str, typer.Option(help="Of the server.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="Of the server.")] = 8000
    endpoint: Annotated[str | None, typer.Option(help="Path; that of the backend.")] = None
    backend: Annotated[
        Literal["openai", "openai-chat"], typer.Option(help="Completions, or chats.")
    ] = "openai"
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="Sent as a bearer token.")
    ] = None
    header: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE of each request; may be repeated.")
    ] = None
    model: Annotated[str | None, typer.Option(help="By default the server's first.")] = None
    served_model_name: Annotated[
        str | None, typer.Option(help="What requests call the model, if not --model.")
    ] = None
    tokenizer: Annotated[str | None, typer.Option(help="By default the model's.")] = None
    skip_tokenizer_init: Annotated[
        bool, typer.Option("--skip-tokenizer-init", help="Send token ids; openai only.")
    ] = False
    request_rate: Annotated[float, typer.Option(help="Requests a second; inf: all at once.")] = inf
    burstiness: Annotated[
        float, typer.Option(help="1: as in a Poisson process; less: in bursts; more: evenly.")
    ] = 1.0
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, help="The rest waits in this client.")
    ] = None
    num_warmups: Annotated[int, typer.Option(min=0, help="Requests that do not count.")] = 0
    ready_check_timeout_sec: Annotated[
        int, typer.Option(min=0, help="For the server to answer a first request; 0: no check.")
    ] = 600
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Always so for random prompts and traces.")
    ] = False
    extra_body: Annotated[str | None, typer.Option(help="JSON, added to each request.")] = None
    percentile_metrics: Annotated[str, typer.Option(help="Of ttft, tpot, itl, e2el.")] = (
        "ttft,tpot,itl"
    )
    metric_percentiles: Annotated[str, typer.Option(help="Such as 50,90,99.")] = "99"
    goodput: Annotated[
        list[str] | None,
        typer.Option(help="METRIC:MS of ttft, tpot, e2el; may be repeated."),
    ] = None
    save_result: Annotated[bool, typer.Option("--save-result", help="Write a JSON file.")] = False
    save_detailed: Annotated[
        bool, typer.Option("--save-detailed", help="With times of every request.")
    ] = False
    result_dir: Annotated[Path | None, typer.Option(help="Where; by default here.")] = None
    result_filename: Annotated[
        str | None, typer.Option(help="By default of backend, rate, model and time.")
    ] = None

    @property
    def url(self) -> str:
        """Of the server."""
        return (self.base_url or f"http://{self.host}:{self.port}").rstrip("/")

    @property
    def path(self) -> str:
        """Where requests go."""
        return self.endpoint or ENDPOINTS[self.backend]

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        pairs = [text.partition("=") for text in self.header or ()]
        if bad := [name for name, equals, _ in pairs if not equals]:
            raise ConfigError(f"--header {bad[0]!r} must be KEY=VALUE")
        bearer = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {**bearer, **{name.strip().lower(): value.strip() for name, _, value in pairs}}

    @property
    def extra(self) -> dict[str, Any]:
        """Further fields of every body."""
        try:
            fields = json.loads(self.extra_body or "{}")
        except ValueError as error:
            raise ConfigError(f"--extra-body is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ConfigError(f"--extra-body must be a JSON object, not {self.extra_body}")
        return fields

    @property
    def metrics(self) -> list[str]:
        """Those whose percentiles are told."""
        names = self.percentile_metrics.split(",")
        if unknown := [name for name in names if name not in METRICS]:
            raise ConfigError(
                f"--percentile-metrics knows {', '.join(METRICS)}, not {unknown[0]!r}"
            )
        return names

    @property
    def ranks(self) -> list[float]:
        """Of the percentiles."""
        return [
            _number(text, "--metric-percentiles", most=100)
            for text in self.metric_percentiles.split(",")
        ]

    @property
    def objectives(self) -> dict[str, float]:
        """Milliseconds by metric: what a request must keep to be a good one."""
        pairs = [pair.partition(":") for text in self.goodput or () for pair in text.split()]
        known = ("ttft", "tpot", "e2el")
        if unknown := [name for name, _, _ in pairs if name not in known]:
            raise ConfigError(f"--goodput is METRIC:MS of {', '.join(known)}, not {unknown[0]!r}")
        return {name: _number(text, "--goodput", most=inf) for name, _, text in pairs}

    @property
    def rate_as_json(self) -> float | str:
        """JSON has no infinity."""
        return "inf" if isinf(self.request_rate) else self.request_rate

    def check(self) -> None:
        """Refuse what could not be sent or told, before anything is."""
        if self.request_rate <= 0 or self.burstiness <= 0:
            raise ConfigError("--request-rate and --burstiness must be above 0")
        if self.skip_tokenizer_init and self.backend == "openai-chat":
            raise ConfigError("--backend openai-chat sends text: it needs a tokenizer")
        _ = (self.headers, self.extra, self.metrics, self.ranks, self.objectives)

    def result_path(self, model: str) -> Path | None:
        """The file to write, if one is wanted."""
        if not self.save_result:
            return None
        now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        limit = f"-concurrency{self.max_concurrency}" if self.max_concurrency else ""
        base = model.rpartition("/")[2]
        name = f"{self.backend}-{self.request_rate}qps{limit}-{base}-{now}.json"
        return (self.result_dir or Path()) / (self.result_filename or name)


def _number(text: str, flag: str, *, most: float) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise ConfigError(f"{flag}: {text!r} is not a number") from error
    if not 0 <= value <= most:
        raise ConfigError(f"{flag}: {text} must be from 0 to {most:g}")
    return value
