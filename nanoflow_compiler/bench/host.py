"""``nanoflow bench host``: what the engine does on the host for a step, on a device that only sleeps.

Everything but the device's work is real: table, batcher, blocks, prefix cache, sampling settings, and
the inputs of a step. The model and the sampler take a fixed time in which the host is left alone.
"""

import itertools
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nanoflow_compiler.bench.garbage import frozen_garbage
from nanoflow_compiler.bench.host_device import MeasuredRunner, SleepStep
from nanoflow_compiler.bench.host_settings import HostSettings
from nanoflow_compiler.bench.progress import progress
from nanoflow_compiler.bench.report import percentiles
from nanoflow_compiler.engine.batcher import Batcher
from nanoflow_compiler.engine.blocks import BlockAllocator
from nanoflow_compiler.engine.core import EngineCore
from nanoflow_compiler.engine.grammars import Grammars
from nanoflow_compiler.engine.limits import RequestLimits
from nanoflow_compiler.engine.messages import EngineRequest
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.engine.table import RequestTable
from nanoflow_compiler.kv_cache import BLOCK_SIZE, KVCache, LayerShape

__all__ = ["measure_host"]

VOCAB_SIZE = 64
WARMUP_STEPS = 20


@dataclass(frozen=True, slots=True)
class _Step:
    host_ms: float
    cpu_ms: float
    num_running: int
    num_tokens: int
    num_joined: int


def measure_host(settings: HostSettings, sampling: dict[str, Any]) -> dict[str, Any]:
    """``max_num_seqs`` requests run all the time: for each that ends, a new one comes.

    ``sampling`` are fields of :class:`SamplingParams`.
    """
    with _one_core():
        load = _Load(settings, sampling)
        try:
            with frozen_garbage():  # as the engine's process does before the first request
                load.warm_up()
                return load.measure()
        finally:
            load.core.close()


@contextmanager
def _one_core() -> Iterator[None]:
    """This thread, those that it starts, and torch: all on the same core."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, cores)


class _Load:
    """As many requests as may run, in a state that does not change any more."""

    def __init__(self, settings: HostSettings, sampling: dict[str, Any]) -> None:
        self.settings = settings
        self.sampling = sampling
        self.device = SleepStep(parts=settings.parts)
        self.core, self.runner = _make_core(settings, self.device)
        self._keys = itertools.count(1)
        self._random = random.Random(settings.seed)

    def warm_up(self) -> None:
        """All prompts in one large step, each with as much of an answer as if it had run for long.

        So lengths, ends and new blocks are spread over the steps as they are in a service.
        """
        settings, batcher = self.settings, self.core.batcher
        most = settings.input_len + settings.output_len
        batcher.max_num_batched_tokens = settings.max_num_seqs * most
        for _ in range(settings.max_num_seqs):
            remaining = self._random.randint(1, settings.output_len)
            self._add(num_prompt=most - remaining, num_output=remaining)
        self._step()
        batcher.max_num_batched_tokens = settings.budget
        for _ in range(WARMUP_STEPS):
            self._step()

    def measure(self) -> dict[str, Any]:
        """The results as JSON has them."""
        self.device.seconds = self.settings.step_time_ms / 1000
        with progress("steps", total=self.settings.num_steps) as advance:
            self._step()  # the device still had steps that took no time
            self.runner.num_idle, start = 0, time.perf_counter()
            steps = []
            for _ in range(self.settings.num_steps):
                steps.append(self._step())
                advance(1)
        duration = time.perf_counter() - start
        host_ms, cpu_ms = [step.host_ms for step in steps], [step.cpu_ms for step in steps]
        return {
            "num_steps": len(steps),
            "num_steps_waiting_for_host": self.runner.num_idle,
            "ms_per_step": duration / len(steps) * 1000,
            "mean_host_ms": float(np.mean(host_ms)),
            "median_host_ms": float(np.median(host_ms)),
            "p99_host_ms": float(np.percentile(host_ms, 99)),
            "max_host_ms": max(host_ms),
            "median_cpu_ms": float(np.median(cpu_ms)),
            "p99_cpu_ms": float(np.percentile(cpu_ms, 99)),
            "host_ms_percentiles": percentiles(host_ms),
            "mean_running": float(np.mean([step.num_running for step in steps])),
            "mean_tokens": float(np.mean([step.num_tokens for step in steps])),
            "mean_joined": float(np.mean([step.num_joined for step in steps])),
        }

    def _step(self) -> _Step:
        """One turn of the engine's loop, and a new request for each that ended in it."""
        core, runner = self.core, self.runner
        before, blocked_s = core.stats(), runner.blocked_s
        start, start_cpu = time.perf_counter(), time.thread_time()
        output = core.step()
        seconds = time.perf_counter() - start - (runner.blocked_s - blocked_s)
        cpu_seconds = time.thread_time() - start_cpu
        num_ended = len(output.finish_reasons) if output else 0
        added_s = sum(self._add_new() for _ in range(num_ended))
        after = core.stats()
        return _Step(
            host_ms=(seconds + added_s) * 1000,
            cpu_ms=(cpu_seconds + added_s) * 1000,
            num_running=after.num_running,
            num_tokens=after.num_batched_tokens - before.num_batched_tokens,
            num_joined=num_ended,
        )

    def _add_new(self) -> float:
        return self._add(num_prompt=self.settings.input_len, num_output=self.settings.output_len)

    def _add(self, *, num_prompt: int, num_output: int) -> float:
        """The seconds that the engine takes to queue one more request."""
        key = next(self._keys)
        request = EngineRequest(
            key=key,
            request_id=str(key),
            prompt_token_ids=self._random.choices(range(VOCAB_SIZE), k=num_prompt),
            params=SamplingParams(max_tokens=num_output, ignore_eos=True, **self.sampling),
            group=key,
        )
        start = time.perf_counter()
        self.core.add(request)
        return time.perf_counter() - start


def _make_core(settings: HostSettings, device: SleepStep) -> tuple[EngineCore, MeasuredRunner]:
    """An engine of blocks that hold one number for each token."""
    max_model_len = settings.input_len + settings.output_len
    num_blocks = settings.max_num_seqs * -(-max_model_len // BLOCK_SIZE)
    table = RequestTable(
        num_slots=settings.max_num_seqs, max_model_len=max_model_len, block_size=BLOCK_SIZE
    )
    allocator = BlockAllocator(
        num_blocks + 1, block_size=BLOCK_SIZE, keep_unused=settings.enable_prefix_caching
    )
    limits = RequestLimits(
        max_model_len=max_model_len,
        vocab_size=VOCAB_SIZE,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
    )
    layer = LayerShape(num_kv_heads=1, head_dim=1, v_head_dim=1, dtype=torch.float16)
    runner = MeasuredRunner(
        device,
        cache=KVCache.allocate([layer], num_blocks=num_blocks + 1),
        num_slots=settings.max_num_seqs,
    )
    batcher = Batcher(table, allocator, max_num_batched_tokens=settings.budget)
    grammars = Grammars(_no_grammars, vocab_size=VOCAB_SIZE)
    return EngineCore(runner, batcher=batcher, limits=limits, grammars=grammars), runner


def _no_grammars() -> Any:
    raise AssertionError("no request of this benchmark has a grammar")
