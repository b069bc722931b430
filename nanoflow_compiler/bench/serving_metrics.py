"""What the answers of a server say about it: numbers with vLLM's names, and the table of its users."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from math import isinf
from typing import Any

import numpy as np

from nanoflow_compiler.bench.openai_client import Answer
from nanoflow_compiler.bench.serve_settings import ServeSettings

__all__ = ["details", "metrics", "table"]

TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
WIDTH = 50


def metrics(
    answers: Sequence[Answer],
    *,
    duration_s: float,
    settings: ServeSettings,
) -> dict[str, Any]:
    """What vLLM's benchmark writes, by its names; None where no request has such a time."""
    objectives = settings.objectives
    good = [answer for answer in answers if not answer.error]
    num_input = sum(answer.prompt_len for answer in good)
    num_output = sum(answer.output_len for answer in good)
    kept = sum(_keeps(answer, objectives) for answer in good)
    found: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(good) / duration_s,
        "request_goodput": kept / duration_s if objectives else None,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "max_output_tokens_per_s": _peak_rate(good),
        "max_concurrent_requests": _peak_concurrency(good),
    }
    for name in settings.metrics:
        found |= _statistics(name, _milliseconds(name, good), settings.ranks)
    return found


def details(answers: Sequence[Answer]) -> dict[str, Any]:
    """Of every request, in the order in which they were sent."""
    return {
        "input_lens": [answer.prompt_len for answer in answers],
        "output_lens": [answer.output_len for answer in answers],
        "ttfts": [answer.ttft_s for answer in answers],
        "itls": [answer.itls_s for answer in answers],
        "latencies": [answer.latency_s for answer in answers],
        "start_times": [answer.start_s for answer in answers],
        "generated_texts": [answer.text for answer in answers],
        "errors": [answer.error for answer in answers],
    }


def table(found: Mapping[str, Any], settings: ServeSettings) -> Iterator[str]:
    """Its lines."""
    yield f"{' Serving Benchmark Result ':=^{WIDTH}}"
    rows = {
        "Successful requests:": found["completed"],
        "Failed requests:": found["failed"],
        "Maximum request concurrency:": settings.max_concurrency,
        "Request rate configured (RPS):": None
        if isinf(settings.request_rate)
        else settings.request_rate,
        "Benchmark duration (s):": found["duration"],
        "Total input tokens:": found["total_input_tokens"],
        "Total generated tokens:": found["total_output_tokens"],
        "Request throughput (req/s):": found["request_throughput"],
        "Request goodput (req/s):": found["request_goodput"],
        "Output token throughput (tok/s):": found["output_throughput"],
        "Peak output token throughput (tok/s):": found["max_output_tokens_per_s"],
        "Peak concurrent requests:": found["max_concurrent_requests"],
        "Total token throughput (tok/s):": found["total_token_throughput"],
    }
    yield from (_row(name, value) for name, value in rows.items() if value is not None)
    for name in settings.metrics:
        yield f"{TITLES[name]:-^{WIDTH}}"
        for key in ("mean", "median", *(f"p{rank:g}" for rank in settings.ranks)):
            yield _row(f"{key.capitalize()} {name.upper()} (ms):", found[f"{key}_{name}_ms"])
    yield "=" * WIDTH


def _row(name: str, value: float | None) -> str:
    if value is None:
        return f"{name:<40} -"
    return f"{name:<40} {value:<10.2f}" if isinstance(value, float) else f"{name:<40} {value:<10}"


def _statistics(
    name: str, values: Sequence[float], ranks: Sequence[float]
) -> dict[str, float | None]:
    keys = ("mean", "median", "std", *(f"p{rank:g}" for rank in ranks))
    if not values:
        return {f"{key}_{name}_ms": None for key in keys}
    numbers = (
        np.mean(values),
        np.median(values),
        np.std(values),
        *(np.percentile(values, rank) for rank in ranks),
    )
    return {f"{key}_{name}_ms": float(n) for key, n in zip(keys, numbers, strict=True)}


def _milliseconds(name: str, answers: Sequence[Answer]) -> list[float]:
    match name:
        case "ttft":
            seconds = [answer.ttft_s for answer in answers]
        case "tpot":
            seconds = [answer.tpot_s for answer in answers if answer.output_len > 1]
        case "itl":
            seconds = [itl for answer in answers for itl in answer.itls_s]
        case _:
            seconds = [answer.latency_s for answer in answers]
    return [one * 1000 for one in seconds]


def _keeps(answer: Answer, objectives: Mapping[str, float]) -> bool:
    reached = {"ttft": answer.ttft_s, "tpot": answer.tpot_s, "e2el": answer.latency_s}
    return all(reached[name] * 1000 <= most for name, most in objectives.items())


def _peak_rate(answers: Sequence[Answer]) -> float:
    """Tokens that came in the second of the clock in which most came."""
    times = [
        answer.start_s + since
        for answer in answers
        for since in accumulate(answer.itls_s, initial=answer.ttft_s)
    ]
    if not times:
        return 0.0
    first = min(answer.start_s for answer in answers)
    return float(np.bincount((np.array(times) - first).astype(int)).max())


def _peak_concurrency(answers: Sequence[Answer]) -> int:
    """A request that ends when another begins was not there with it."""
    begins = [(answer.start_s, 1) for answer in answers]
    ends = [(answer.start_s + answer.latency_s, -1) for answer in answers]
    return max(accumulate(change for _, change in sorted(begins + ends)), default=0)
