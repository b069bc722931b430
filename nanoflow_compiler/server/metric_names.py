"""Which histograms and counters there are; names, meanings and buckets are vLLM's."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["COUNTERS", "HISTOGRAMS", "HistogramSpec", "up_to"]


def _floats(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split()))


FIRST_TOKEN_S = _floats(
    "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
)
TOKEN_S = _floats("0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80")
REQUEST_S = _floats("0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680")
COMPLETIONS = (1, 2, 5, 10, 20)


@dataclass(frozen=True, slots=True)
class HistogramSpec:
    """A histogram; without buckets of its own it counts tokens, up to the length of the model."""

    text: str
    buckets: Sequence[float] | None = None


HISTOGRAMS = {
    "time_to_first_token_seconds": HistogramSpec("From arrival to the first token.", FIRST_TOKEN_S),
    "inter_token_latency_seconds": HistogramSpec("Between one token and the next.", TOKEN_S),
    "request_time_per_output_token_seconds": HistogramSpec(
        "Mean over a completion, its first token left out.", TOKEN_S
    ),
    "e2e_request_latency_seconds": HistogramSpec("From arrival to the last token.", REQUEST_S),
    "request_queue_time_seconds": HistogramSpec(
        "From arrival in the engine to the first step.", REQUEST_S
    ),
    "request_prefill_time_seconds": HistogramSpec(
        "From the first step to the first token.", REQUEST_S
    ),
    "request_decode_time_seconds": HistogramSpec(
        "From the first token to the last one.", REQUEST_S
    ),
    "request_inference_time_seconds": HistogramSpec(
        "From the first step to the last token.", REQUEST_S
    ),
    "request_prompt_tokens": HistogramSpec("Tokens of a prompt."),
    "request_generation_tokens": HistogramSpec("Tokens of a completion."),
    "request_max_num_generation_tokens": HistogramSpec(
        "Most tokens of the completions of a prompt."
    ),
    "request_params_max_tokens": HistogramSpec("max_tokens, where a request has it."),
    "request_params_n": HistogramSpec("Completions that were asked for.", COMPLETIONS),
}
COUNTERS = {
    "prompt_tokens": "Prompt tokens of requests that got a first token.",
    "generation_tokens": "Generated tokens.",
}


def up_to(most: int) -> list[int]:
    """1, 2, 5, 10, 20, ... as far as they are not above ``most``; at least 1."""
    numbers = (mantissa * 10**exponent for exponent in range(19) for mantissa in (1, 2, 5))
    return [number for number in numbers if number <= max(most, 1)]
