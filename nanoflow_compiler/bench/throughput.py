"""``nanoflow bench throughput``: how fast many requests are answered that are all there at once."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nanoflow_compiler.bench.dataset import BenchRequest, DatasetSettings
from nanoflow_compiler.bench.hf import HfBackend
from nanoflow_compiler.bench.llm import LlmBackend
from nanoflow_compiler.bench.model import ModelSettings
from nanoflow_compiler.bench.progress import progress
from nanoflow_compiler.bench.requests import make_requests
from nanoflow_compiler.bench.throughput_settings import ThroughputSettings
from nanoflow_compiler.errors import ConfigError

__all__ = ["measure_throughput"]

DEFAULTS = {"enforce_eager": False, "options": {"parts": "auto"}}
"""The arguments of an engine that no flag has changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counts:
    num_input: int
    num_output: int
    seconds: float


def measure_throughput(
    settings: ThroughputSettings,
    *,
    model: ModelSettings,
    dataset: DatasetSettings,
    engine: dict[str, Any],
) -> dict[str, Any]:
    """The results, with vLLM's keys; ``engine`` are further arguments of :class:`LLM`."""
    dataset.check()
    backend = _start(settings, model, engine)
    try:
        requests = make_requests(
            dataset,
            vocabulary=backend.vocabulary,
            tokenizer=backend.tokenizer,
            longest=backend.max_model_len,
        )
        backend.run(requests[: settings.num_warmups], lambda _: None)
        with progress("requests", total=len(requests)) as advance:
            counts = _timed(backend.run, requests, advance)
    finally:
        backend.close()
    return _results(counts, num_requests=len(requests))


def _start(
    settings: ThroughputSettings, model: ModelSettings, engine: dict[str, Any]
) -> HfBackend | LlmBackend:
    if settings.backend == "nanoflow":
        if settings.hf_max_batch_size is not None:
            raise ConfigError("--hf-max-batch-size is for --backend hf; use --max-num-seqs")
        return LlmBackend(model, engine)
    if settings.hf_max_batch_size is None:
        raise ConfigError("--backend hf needs --hf-max-batch-size")
    if engine != DEFAULTS:
        raise ConfigError("the engine's flags, such as --max-num-seqs, are for --backend nanoflow")
    return HfBackend(model, max_batch_size=settings.hf_max_batch_size)


Run = Callable[[Sequence[BenchRequest], Callable[[int], None]], int]


def _timed(run: Run, requests: Sequence[BenchRequest], advance: Callable[[int], None]) -> _Counts:
    start = time.perf_counter()
    num_output = run(requests, advance)
    seconds = time.perf_counter() - start
    num_input = sum(len(request.prompt_token_ids) for request in requests)
    return _Counts(num_input=num_input, num_output=num_output, seconds=seconds)


def _results(counts: _Counts, *, num_requests: int) -> dict[str, Any]:
    total = counts.num_input + counts.num_output
    return {
        "elapsed_time": counts.seconds,
        "num_requests": num_requests,
        "total_num_tokens": total,
        "total_input_tokens": counts.num_input,
        "total_output_tokens": counts.num_output,
        "requests_per_second": num_requests / counts.seconds,
        "tokens_per_second": total / counts.seconds,
        "output_tokens_per_second": counts.num_output / counts.seconds,
    }
