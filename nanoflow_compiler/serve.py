"""``nanoflow serve``: load a model, start the engine, answer over HTTP until a signal."""

import asyncio
import time
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.engine.assemble import make_core
from nanoflow_compiler.engine.async_engine import AsyncEngine
from nanoflow_compiler.engine.core import EngineCore
from nanoflow_compiler.engine.engine_config import EngineConfig
from nanoflow_compiler.engine.served import Served
from nanoflow_compiler.server.run import serve
from nanoflow_compiler.server.settings import ServerSettings

__all__ = ["ServeConfig", "serve_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What a user asked for; the rest are the defaults of engine and compiler."""

    model: str
    dtype: str
    enforce_eager: bool
    engine: dict[str, Any]
    """Fields of :class:`EngineConfig`."""
    options: dict[str, Any]
    """Fields of :class:`CompileConfig`."""
    server: ServerSettings


def serve_model(config: ServeConfig) -> None:
    """Returns after SIGTERM or SIGINT; a setting that cannot be is an error before anything loads."""
    compile_config = None if config.enforce_eager else CompileConfig.from_options(config.options)
    EngineConfig(**{"max_model_len": 1, **config.engine})
    start = time.perf_counter()
    served = Served.find(config.model, tokenizer=None, dtype=config.dtype, load_format="auto")
    engine_config = EngineConfig(**{"max_model_len": served.max_model_len, **config.engine})
    loaded = time.perf_counter()
    core = make_core(served, engine_config, compile_config=compile_config)
    stages = {"load": loaded - start, "start": time.perf_counter() - loaded}
    _print_config(config, engine_config, compile_config, core=core, stages=stages)
    asyncio.run(_serve(core, served, config))


async def _serve(core: EngineCore, served: Served, config: ServeConfig) -> None:
    async with AsyncEngine(core, model_name=config.model, tokenizer=served.tokenizer) as engine:
        await serve(engine, config.server)


def _print_config(
    config: ServeConfig,
    engine_config: EngineConfig,
    compile_config: CompileConfig | None,
    *,
    core: EngineCore,
    stages: dict[str, float],
) -> None:
    """One table of what is in force, on standard error."""
    allocator = core.batcher.allocator
    rows: dict[str, dict[str, Any]] = {
        "model": {"model": config.model, "dtype": config.dtype},
        "engine": asdict(engine_config)
        | {"KV blocks": f"{allocator.num_usable} of {allocator.block_size} tokens"},
        "compile": asdict(compile_config) if compile_config else {"enforce_eager": True},
        "server": asdict(config.server) | {"api_keys": len(config.server.api_keys)},
        "seconds": {name: f"{seconds:.1f}" for name, seconds in stages.items()},
    }
    table = Table(title="nanoflow serve", show_lines=False)
    for column in ("part", "setting", "value"):
        table.add_column(column)
    for part, settings in rows.items():
        for name, value in settings.items():
            table.add_row(part, name, str(value))
    Console(stderr=True).print(table)
