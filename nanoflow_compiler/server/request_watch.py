"""Observes the outputs of one prompt as they pass, for metrics and logs."""

import logging
import time
from dataclasses import dataclass

from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.server.engine_client import Completion, Output, RequestTimes
from nanoflow_compiler.server.metrics import Metrics

__all__ = ["RequestWatch"]

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class _Progress:
    """One completion."""

    num_tokens: int = 0
    first: float = 0.0
    """When its first token came."""
    last: float = 0.0
    reason: str | None = None


class RequestWatch:
    """``see`` each output, then ``close`` once."""

    def __init__(
        self,
        metrics: Metrics,
        request_id: str,
        *,
        arrival: float,
        num_prompt_tokens: int,
        params: SamplingParams,
        log_level: int = logging.INFO,
    ) -> None:
        self._metrics = metrics
        self._request_id = request_id
        self._arrival = arrival
        self._num_prompt_tokens = num_prompt_tokens
        self._log_level = log_level
        self._max_tokens = params.max_tokens
        self._times: RequestTimes | None = None
        self._has_begun = False
        self._progress = [_Progress() for _ in range(params.n)]
        _LOG.debug("%s: arrived with %d tokens, %s", request_id, num_prompt_tokens, params)

    def see(self, output: Output) -> None:
        now = time.monotonic()
        for one in output.outputs:
            progress = self._progress[one.index]
            if num_new := len(one.token_ids) - progress.num_tokens:
                if not self._has_begun:
                    self._begin(now, output.times)
                self._count(now, progress, num_new=num_new)
            if one.finish_reason and progress.reason is None:
                self._end(now, progress, one)

    def close(self, reason: str) -> None:
        """``reason`` is why those ended that did not end by themselves; a refusal is no end."""
        if reason == "refused" and self._has_begun:
            reason = "error"
        for progress in self._progress:
            if progress.reason is None:
                progress.reason = reason
                if reason != "refused":
                    self._metrics.count_end(reason)
        counts = [progress.num_tokens for progress in self._progress]
        if self._has_begun:
            self._metrics.histograms["request_max_num_generation_tokens"].observe(max(counts))
        _LOG.log(
            self._log_level,
            "%s: %d tokens in, %d out, %s, %.2f s",
            self._request_id,
            self._num_prompt_tokens,
            sum(counts),
            ", ".join(str(progress.reason) for progress in self._progress),
            time.monotonic() - self._arrival,
        )

    def _begin(self, now: float, times: RequestTimes | None) -> None:
        self._has_begun, self._times = True, times
        self._metrics.counters["prompt_tokens"].inc(self._num_prompt_tokens)
        histograms = self._metrics.histograms
        histograms["time_to_first_token_seconds"].observe(now - self._arrival)
        histograms["request_prompt_tokens"].observe(self._num_prompt_tokens)
        histograms["request_params_n"].observe(len(self._progress))
        if self._max_tokens is not None:
            histograms["request_params_max_tokens"].observe(self._max_tokens)
        if times is not None:
            histograms["request_queue_time_seconds"].observe(times.queued_s)
            histograms["request_prefill_time_seconds"].observe(times.prefill_s)

    def _count(self, now: float, progress: _Progress, *, num_new: int) -> None:
        self._metrics.counters["generation_tokens"].inc(num_new)
        if progress.num_tokens:
            latency = self._metrics.histograms["inter_token_latency_seconds"]
            latency.observe(now - progress.last)
        else:
            progress.first = now
        progress.last = now
        progress.num_tokens += num_new

    def _end(self, now: float, progress: _Progress, completion: Completion) -> None:
        progress.reason = completion.finish_reason
        self._metrics.count_end(str(completion.finish_reason))
        histograms = self._metrics.histograms
        histograms["e2e_request_latency_seconds"].observe(now - self._arrival)
        histograms["request_generation_tokens"].observe(progress.num_tokens)
        if not progress.num_tokens:
            return
        decode_s = progress.last - progress.first
        histograms["request_decode_time_seconds"].observe(decode_s)
        if progress.num_tokens > 1:
            mean = decode_s / (progress.num_tokens - 1)
            histograms["request_time_per_output_token_seconds"].observe(mean)
        if self._times is not None:
            prefill_s = self._times.prefill_s
            histograms["request_inference_time_seconds"].observe(prefill_s + decode_s)
