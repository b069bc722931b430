"""Prometheus metrics with vLLM's names and meanings, under a prefix of ours."""

import time

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from nanoflow_compiler.server.engine_client import EngineStats
from nanoflow_compiler.server.engine_metrics import EngineMetrics
from nanoflow_compiler.server.metric_names import COUNTERS, HISTOGRAMS, HistogramSpec, up_to

__all__ = ["Metrics"]

END_REASONS = ("stop", "length", "abort", "error")


class Metrics:
    """A registry of its own, so that two servers in one process do not mix."""

    def __init__(
        self, *, model_name: str, max_model_len: int, block_size: int, prefix: str = "nanoflow"
    ) -> None:
        self._registry = CollectorRegistry()
        self._prefix = prefix
        self._model_name = model_name
        self._token_buckets = up_to(max_model_len)
        self._engine = EngineMetrics(model_name=model_name, block_size=block_size, prefix=prefix)
        self._registry.register(self._engine)
        ProcessCollector(registry=self._registry)
        self.histograms = {name: self._histogram(name, spec) for name, spec in HISTOGRAMS.items()}
        self.counters = {name: self._counter(name, text) for name, text in COUNTERS.items()}
        self._success = Counter(
            f"{prefix}:request_success",
            "Completions that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        for reason in END_REASONS:
            self._success.labels(model_name, reason)

    def count_end(self, reason: str) -> None:
        self._success.labels(self._model_name, reason).inc()

    def set_started(self) -> None:
        """From now on requests are answered: how long that took since the process began."""
        # Only Linux tells when a process began.
        began = self._registry.get_sample_value("process_start_time_seconds")
        if began is not None:
            gauge = Gauge(
                f"{self._prefix}:startup_time_seconds",
                "From the start of the process until requests were answered.",
                ["model_name"],
                registry=self._registry,
            )
            gauge.labels(self._model_name).set(time.time() - began)

    def total(self, name: str) -> float:
        """Of a counter, so far."""
        labels = {"model_name": self._model_name}
        return self._registry.get_sample_value(f"{self._prefix}:{name}_total", labels) or 0.0

    def exposition(self, stats: EngineStats | None, *, num_rejected: int) -> bytes:
        """The text that Prometheus reads; without stats, only what the server itself counts."""
        self._engine.stats, self._engine.num_rejected = stats, num_rejected
        return generate_latest(self._registry)

    def _histogram(self, name: str, spec: HistogramSpec) -> Histogram:
        return Histogram(
            f"{self._prefix}:{name}",
            spec.text,
            ["model_name"],
            registry=self._registry,
            buckets=spec.buckets or self._token_buckets,
        ).labels(self._model_name)

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(f"{self._prefix}:{name}", text, ["model_name"], registry=self._registry)
        return counter.labels(self._model_name)
