"""Prometheus metrics with vLLM's names and meanings, under ``nanoflow:``."""

import logging
import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nanoflow_compiler.server.engine_client import EngineStats, Output

__all__ = ["Metrics", "RequestWatch"]

_LOG = logging.getLogger(__name__)

FIRST_TOKEN_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
TOKEN_S = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
TOKENS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))

HISTOGRAMS = {
    "time_to_first_token_seconds": ("From arrival to the first token.", FIRST_TOKEN_S),
    "inter_token_latency_seconds": ("Between one token and the next.", TOKEN_S),
    "time_per_output_token_seconds": ("The same, by its older name.", TOKEN_S),
    "request_time_per_output_token_seconds": ("Mean over a request, first one left out.", TOKEN_S),
    "e2e_request_latency_seconds": ("From arrival to the last token.", REQUEST_S),
    "request_prompt_tokens": ("Prompt tokens of a request.", TOKENS),
    "request_generation_tokens": ("Generated tokens of a request.", TOKENS),
}
COUNTERS = {
    "prompt_tokens": "Prompt tokens of requests that got a first token.",
    "generation_tokens": "Generated tokens.",
}


class Metrics:
    """A registry of its own, so that two servers in one process do not mix."""

    def __init__(self, *, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._engine = _EngineCollector(model_name)
        self._registry.register(self._engine)
        self.histograms = {
            name: Histogram(
                f"nanoflow:{name}", text, ["model_name"], registry=self._registry, buckets=buckets
            ).labels(model_name)
            for name, (text, buckets) in HISTOGRAMS.items()
        }
        self.counters = {
            name: Counter(f"nanoflow:{name}", text, ["model_name"], registry=self._registry).labels(
                model_name
            )
            for name, text in COUNTERS.items()
        }
        self._model_name = model_name
        self._success = Counter(
            "nanoflow:request_success",
            "Completions that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort"):
            self._success.labels(model_name, reason)

    def watch(self, request_id: str, *, arrival: float) -> "RequestWatch":
        return RequestWatch(self, request_id, arrival=arrival)

    def count_end(self, reason: str) -> None:
        self._success.labels(self._model_name, reason).inc()

    def exposition(self, stats: EngineStats | None, *, num_rejected: int) -> bytes:
        """The text that Prometheus reads; without stats, only what the server itself counts."""
        self._engine.stats, self._engine.num_rejected = stats, num_rejected
        return generate_latest(self._registry)


class RequestWatch:
    """Observes the outputs of one prompt as they pass."""

    def __init__(self, metrics: Metrics, request_id: str, *, arrival: float) -> None:
        self._metrics = metrics
        self._request_id = request_id
        self._arrival = self._first = self._last = arrival
        self._num_prompt_tokens = 0
        self._num_tokens: dict[int, int] = {}
        self._ended: dict[int, str] = {}

    def see(self, output: Output) -> None:
        now = time.monotonic()
        num_before = sum(self._num_tokens.values())
        self._num_tokens = {one.index: len(one.token_ids) for one in output.outputs}
        if num_new := sum(self._num_tokens.values()) - num_before:
            self._observe_tokens(now, output, num_new=num_new, is_first=not num_before)
            self._last = now
        for one in output.outputs:
            if one.finish_reason and one.index not in self._ended:
                self._ended[one.index] = one.finish_reason
                self._end(now, num_tokens=len(one.token_ids), reason=one.finish_reason)

    def close(self) -> None:
        """Those that did not end by themselves were aborted; one log line for the whole request."""
        for index in self._num_tokens.keys() - self._ended.keys():
            self._ended[index] = "abort"
            self._metrics.count_end("abort")
        _LOG.info(
            "%s: %d tokens in, %d out, %s, %.2f s",
            self._request_id,
            self._num_prompt_tokens,
            sum(self._num_tokens.values()),
            ", ".join(self._ended[index] for index in sorted(self._ended)) or "no answer",
            time.monotonic() - self._arrival,
        )

    def _observe_tokens(self, now: float, output: Output, *, num_new: int, is_first: bool) -> None:
        counters, histograms = self._metrics.counters, self._metrics.histograms
        counters["generation_tokens"].inc(num_new)
        if is_first:
            self._num_prompt_tokens = len(output.prompt_token_ids)
            counters["prompt_tokens"].inc(self._num_prompt_tokens)
            histograms["request_prompt_tokens"].observe(self._num_prompt_tokens)
            histograms["time_to_first_token_seconds"].observe(now - self._arrival)
            self._first = now
            return
        histograms["inter_token_latency_seconds"].observe(now - self._last)
        histograms["time_per_output_token_seconds"].observe(now - self._last)

    def _end(self, now: float, *, num_tokens: int, reason: str) -> None:
        histograms = self._metrics.histograms
        self._metrics.count_end(reason)
        histograms["e2e_request_latency_seconds"].observe(now - self._arrival)
        histograms["request_generation_tokens"].observe(num_tokens)
        if num_tokens > 1:
            mean = (now - self._first) / (num_tokens - 1)
            histograms["request_time_per_output_token_seconds"].observe(mean)


class _EngineCollector(Collector):
    """Shows the engine's own counts, which are totals already."""

    def __init__(self, model_name: str) -> None:
        self.stats: EngineStats | None = None
        self.num_rejected = 0
        self._labels = [model_name]

    def collect(self) -> Iterable[Metric]:
        yield self._counter(
            "admission_rejections", "Requests answered with 503.", self.num_rejected
        )
        stats = self.stats
        if stats is None:
            return
        used = stats.num_used_blocks / max(stats.num_blocks, 1)
        yield self._gauge("num_requests_running", "Requests in the batch.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Requests in the queue.", stats.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Blocks in use; 1 is all.", used)
        yield self._counter("num_preemptions", "Requests that lost blocks.", stats.num_preemptions)
        yield self._counter(
            "prefix_cache_queries", "Prompt tokens looked up.", stats.num_cache_queries
        )
        yield self._counter("prefix_cache_hits", "Prompt tokens found.", stats.num_cache_hits)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"nanoflow:{name}", text, labels=["model_name"])
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"nanoflow:{name}", text, labels=["model_name"])
        family.add_metric(self._labels, value)
        return family
