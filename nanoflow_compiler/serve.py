"""``nanoflow serve``: start an engine's process, answer over HTTP until a signal."""

import asyncio
import socket
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.engine.async_engine import AsyncEngine
from nanoflow_compiler.engine.engine_process import EngineProcess
from nanoflow_compiler.engine.process import ProcessLink, Ready
from nanoflow_compiler.engine.spec import EngineSpec
from nanoflow_compiler.server.run import bind, serve
from nanoflow_compiler.server.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ServeConfig", "serve_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What a user asked for."""

    engine: EngineSpec
    server: ServerSettings
    max_engine_restarts: int = 0
    """How often an engine that died is started again; its requests are lost."""


def serve_model(config: ServeConfig, *, early: EngineProcess | None = None) -> None:
    """Returns after SIGTERM or SIGINT; an address that cannot be had costs no time.

    ``early`` is the engine's process, where it was started before.
    """
    with bind(config.server) as bound:
        link = ProcessLink(config.engine, early=early)
        _print_config(config, link.ready)
        asyncio.run(_serve(link, config, bound))


async def _serve(link: ProcessLink, config: ServeConfig, bound: socket.socket) -> None:
    engine = AsyncEngine(
        link,
        model_name=config.engine.model,
        tokenizer=link.ready.tokenizer,
        sampling_defaults=link.ready.sampling_defaults,
        max_restarts=config.max_engine_restarts,
    )
    async with engine:
        await serve(engine, config.server, bound)


def _print_config(config: ServeConfig, ready: Ready) -> None:
    """One table of what is in force, on standard error."""
    spec = config.engine
    compiled = asdict(CompileConfig.from_options(spec.options))
    rows: dict[str, Mapping[str, Any]] = {
        "model": _model_rows(spec),
        "engine": dict(ready.facts) | {"max_engine_restarts": config.max_engine_restarts},
        "compile": {"enforce_eager": True} if spec.enforce_eager else compiled,
        "server": asdict(config.server) | {"api_keys": len(config.server.api_keys)},
        "seconds": {name: f"{seconds:.1f}" for name, seconds in ready.seconds.items()},
    }
    table = Table(title="nanoflow serve", show_lines=False)
    for column in ("part", "setting", "value"):
        table.add_column(column)
    for part, settings in rows.items():
        for name, value in settings.items():
            table.add_row(part, name, _shown(name, value))
    Console(stderr=True).print(table)


def _model_rows(spec: EngineSpec) -> dict[str, Any]:
    dummy = {"dummy_distribution": spec.dummy_distribution} if spec.load_format == "dummy" else {}
    overrides = {"hf_overrides": dict(spec.hf_overrides)} if spec.hf_overrides else {}
    return {"model": spec.model, "load_format": spec.load_format, **dummy, **overrides}


def _shown(name: str, value: object) -> str:
    if name.endswith("_bytes") and isinstance(value, int) and value >= 2**26:
        return f"{value} ({value / 2**30:.2f} GiB)"
    return str(value)
