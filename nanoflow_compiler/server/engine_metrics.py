"""Metrics of what the engine itself counts: its totals are shown as they are."""

from collections.abc import Iterable
from itertools import accumulate

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from nanoflow_compiler.engine.messages import STEP_TOKEN_BUCKETS
from nanoflow_compiler.server.engine_client import EngineStats

__all__ = ["EngineMetrics"]


class EngineMetrics(Collector):
    """Shows the stats that it was given last; without any, only what the server counts."""

    def __init__(self, *, model_name: str, block_size: int, prefix: str) -> None:
        self.stats: EngineStats | None = None
        self.num_rejected = 0
        self._model_name = model_name
        self._block_size = block_size
        self._prefix = prefix

    def collect(self) -> Iterable[Metric]:
        yield self._counter(
            "admission_rejections", "Requests answered with 503.", self.num_rejected
        )
        if self.stats is not None:
            yield from self._now(self.stats)
            yield from self._totals(self.stats)
            yield self._step_sizes(self.stats)

    def _now(self, stats: EngineStats) -> Iterable[Metric]:
        used = stats.num_used_blocks / max(stats.num_blocks, 1)
        yield self._gauge("num_requests_running", "Requests in the batch.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Requests in the queue.", stats.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Blocks in use; 1 is all.", used)
        config = GaugeMetricFamily(
            f"{self._prefix}:cache_config_info",
            "Of the KV cache, as labels.",
            labels=["model_name", "block_size", "num_gpu_blocks"],
        )
        config.add_metric([self._model_name, str(self._block_size), str(stats.num_blocks)], 1)
        yield config

    def _totals(self, stats: EngineStats) -> Iterable[Metric]:
        yield self._counter("num_preemptions", "Requests that lost blocks.", stats.num_preemptions)
        yield self._counter(
            "prefix_cache_queries", "Prompt tokens looked up.", stats.num_cache_queries
        )
        yield self._counter("prefix_cache_hits", "Prompt tokens found.", stats.num_cache_hits)

    def _step_sizes(self, stats: EngineStats) -> Metric:
        bounds = [*map(floatToGoString, STEP_TOKEN_BUCKETS), "+Inf"]
        counts = accumulate(stats.step_tokens)
        family = HistogramMetricFamily(
            f"{self._prefix}:iteration_tokens_total", "Tokens of a step.", labels=["model_name"]
        )
        family.add_metric(
            [self._model_name],
            buckets=list(zip(bounds, counts, strict=True)),
            sum_value=stats.num_batched_tokens,
        )
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"{self._prefix}:{name}", text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"{self._prefix}:{name}", text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family
