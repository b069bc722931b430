"""A line every ten seconds, while there is something to say."""

import asyncio
import logging
import time

from nanoflow_compiler.errors import EngineDeadError
from nanoflow_compiler.server.engine_client import EngineClient, EngineStats
from nanoflow_compiler.server.metrics import Metrics

__all__ = ["StatsLog"]

_LOG = logging.getLogger(__name__)

INTERVAL_S = 10.0


class StatsLog:
    """Says what happened since it last looked."""

    def __init__(self, engine: EngineClient, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._time = time.monotonic()
        self._totals = (0.0, 0.0, 0, 0)

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                line = self.line(await self._engine.stats())
            except EngineDeadError:
                continue
            if line is not None:
                _LOG.info(line)

    def line(self, stats: EngineStats) -> str | None:
        """None if nothing ran, waited or ended since the last one."""
        now, last = time.monotonic(), self._totals
        self._totals = (
            self._metrics.total("prompt_tokens"),
            self._metrics.total("generation_tokens"),
            stats.num_cache_queries,
            stats.num_cache_hits,
        )
        num_in, num_out, num_queries, num_hits = (
            total - before for total, before in zip(self._totals, last, strict=True)
        )
        seconds, self._time = max(now - self._time, 1e-9), now
        if not (num_in or num_out or stats.num_running or stats.num_waiting):
            return None
        return (
            f"{stats.num_running} running, {stats.num_waiting} waiting, "
            f"{num_in / seconds:.1f} prompt tokens/s, {num_out / seconds:.1f} generated tokens/s, "
            f"KV cache {stats.num_used_blocks / max(stats.num_blocks, 1):.1%} used, "
            f"prefix cache {num_hits / max(num_queries, 1):.1%} hit"
        )
