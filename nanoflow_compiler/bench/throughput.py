"""``nanoflow bench throughput``: how fast many requests are answered that are all there at once."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from nanoflow_compiler.bench.dataset import BenchRequest, DatasetSettings
from nanoflow_compiler.bench.gpu_meter import GpuMeter, GpuUse, Watch, has_meter
from nanoflow_compiler.bench.hf import HfBackend
from nanoflow_compiler.bench.llm import LlmBackend
from nanoflow_compiler.bench.model import ModelSettings
from nanoflow_compiler.bench.progress import progress
from nanoflow_compiler.bench.report import count_results, percentiles
from nanoflow_compiler.bench.requests import make_requests
from nanoflow_compiler.bench.throughput_settings import ThroughputSettings
from nanoflow_compiler.bench.wall import check_wall, measure_wall
from nanoflow_compiler.bench.workload import Workload
from nanoflow_compiler.errors import ConfigError
from nanoflow_compiler.models.place import current_device, find_device

__all__ = ["measure_throughput", "throughput_rows"]

DEFAULTS = {"enforce_eager": False, "options": {}}
"""The arguments of an engine that no flag has changed."""

Backend = HfBackend | LlmBackend


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """All requests, answered."""

    results: dict[str, Any]
    workload: Workload | None
    """Where the engine says what its limits are."""


def measure_throughput(
    settings: ThroughputSettings,
    *,
    model: ModelSettings,
    dataset: DatasetSettings,
    engine: dict[str, Any],
) -> dict[str, Any]:
    """The results, with vLLM's keys; ``engine`` are further arguments of :class:`LLM`."""
    dataset.check()
    shapes = check_wall(model) if settings.wall else None
    run = _answer_all(settings, model=model, dataset=dataset, engine=engine)
    if shapes is None:
        return run.results
    assert run.workload is not None
    # The engine is closed: its memory is the wall's now.
    gc.collect()
    torch.cuda.empty_cache()
    with current_device(find_device(model.device)):
        wall = measure_wall(shapes, run.workload).results()
    share = run.results["tokens_per_second"] / wall["tokens_per_second"]
    return {**run.results, "fraction_of_wall": share, "wall": wall}


def throughput_rows(found: Mapping[str, Any]) -> dict[str, object]:
    """What is printed above the last line: what there is of it."""
    rows: dict[str, object] = {
        f"Seconds to {stage}": seconds for stage, seconds in found["seconds"].items()
    }
    titles = {
        "joules_per_1000_tokens": "Joules per 1000 tokens",
        "mean_power_watts": "Mean power (W)",
        "mean_sm_clock_mhz": "Mean SM clock (MHz)",
        "fraction_of_wall": "Fraction of the wall",
    }
    rows |= {title: found[name] for name, title in titles.items() if found.get(name) is not None}
    for name, title in (("step_us", "Step"), ("step_gaps_us", "Gap between steps")):
        if times := found.get(name):
            rows |= {f"{title}, {rank} (us)": times[rank] for rank in ("mean", "p50", "p99")}
    if wall := found.get("wall"):
        rows["Wall (total tokens/s)"] = wall["tokens_per_second"]
    return rows


def _answer_all(
    settings: ThroughputSettings,
    *,
    model: ModelSettings,
    dataset: DatasetSettings,
    engine: dict[str, Any],
) -> _Run:
    backend = _start(settings, model, engine)
    try:
        requests = make_requests(
            dataset,
            vocabulary=backend.vocabulary,
            tokenizer=backend.tokenizer,
            longest=backend.max_model_len,
        )
        backend.run(requests[: settings.num_warmups], lambda _: None)
        backend.take_step_times()  # those of the warm-up
        with progress("requests", total=len(requests)) as advance:
            counted, use = _timed(backend, requests, advance)
        results = counted | _device_results(backend, use, counted) | {"seconds": backend.seconds}
    finally:
        backend.close()
    facts = backend.facts
    workload = Workload.of(requests, facts) if facts else None
    return _Run(results=results | {"engine": dict(facts)}, workload=workload)


def _start(settings: ThroughputSettings, model: ModelSettings, engine: dict[str, Any]) -> Backend:
    if settings.backend == "nanoflow":
        if settings.hf_max_batch_size is not None:
            raise ConfigError("--hf-max-batch-size is for --backend hf; use --max-num-seqs")
        return LlmBackend(model, engine, temperature=settings.temperature)
    if settings.hf_max_batch_size is None:
        raise ConfigError("--backend hf needs --hf-max-batch-size")
    if settings.wall:
        raise ConfigError("--wall is for --backend nanoflow, whose step it describes")
    if engine != DEFAULTS:
        raise ConfigError("the engine's flags, such as --max-num-seqs, are for --backend nanoflow")
    size = settings.hf_max_batch_size
    return HfBackend(model, max_batch_size=size, temperature=settings.temperature)


def _timed(
    backend: Backend, requests: Sequence[BenchRequest], advance: Callable[[int], None]
) -> tuple[dict[str, Any], GpuUse | None]:
    """Counts and rates, and what the GPU took."""
    if backend.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(backend.device)
    is_metered = backend.device.type == "cuda" and has_meter()
    watch = Watch(GpuMeter(backend.device)) if is_metered else nullcontext()
    with watch:
        start = time.perf_counter()
        num_output = backend.run(requests, advance)
        seconds = time.perf_counter() - start
    counted = count_results(
        num_requests=len(requests),
        num_input=sum(len(request.prompt_token_ids) for request in requests),
        num_output=num_output,
        seconds=seconds,
    )
    return counted, watch.use if isinstance(watch, Watch) else None


def _device_results(
    backend: Backend, use: GpuUse | None, counted: Mapping[str, Any]
) -> dict[str, Any]:
    times = backend.take_step_times()
    results: dict[str, Any] = {
        "step_us": _summary(times.durations_us) if times else None,
        "step_gaps_us": _summary(times.gaps_us) if times else None,
    }
    if use is not None:
        results |= use.results(num_tokens=counted["total_num_tokens"])
    if backend.device.type == "cuda":
        results["peak_memory_bytes"] = torch.cuda.max_memory_allocated(backend.device)
    return results


def _summary(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    ranked = percentiles(values, (50, 99))
    return {
        "mean": fmean(values),
        "p50": ranked["50"],
        "p99": ranked["99"],
        "num": len(values),
    }
