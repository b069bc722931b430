"""``nanoflow bench latency``: how long one batch takes from the prompts to the last token."""

import time
from typing import Any

import numpy as np

from nanoflow_compiler.bench.dataset import BenchRequest
from nanoflow_compiler.bench.latency_settings import LatencySettings
from nanoflow_compiler.bench.llm import LlmBackend
from nanoflow_compiler.bench.model import ModelSettings
from nanoflow_compiler.bench.progress import progress
from nanoflow_compiler.bench.report import percentiles

__all__ = ["measure_latency"]


def measure_latency(
    settings: LatencySettings, *, model: ModelSettings, engine: dict[str, Any]
) -> dict[str, Any]:
    """The results, with vLLM's keys; every round has prompts that no prefix cache has seen."""
    backend = LlmBackend(model, engine)
    rng = np.random.default_rng(settings.seed)
    total = settings.num_iters_warmup + settings.num_iters
    latencies = []
    try:
        with progress("rounds", total=total) as advance:
            for _ in range(total):
                latencies.append(_round(backend, settings, rng))
                advance(1)
    finally:
        backend.close()
    counted = latencies[settings.num_iters_warmup :]
    return {
        "avg_latency": float(np.mean(counted)),
        "latencies": counted,
        "percentiles": percentiles(counted),
    }


def _round(backend: LlmBackend, settings: LatencySettings, rng: np.random.Generator) -> float:
    requests = [
        BenchRequest(
            prompt_token_ids=backend.vocabulary.draw(rng, settings.input_len),
            output_len=settings.output_len,
        )
        for _ in range(settings.batch_size)
    ]
    start = time.perf_counter()
    backend.run(requests, lambda _: None)
    return time.perf_counter() - start
