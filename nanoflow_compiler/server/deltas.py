"""What is new in a completion since the last time, and safe to send."""

from collections.abc import Sequence
from dataclasses import dataclass

from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.server.engine_client import Completion, TokenLogprobs

__all__ = ["Delta", "DeltaCursor"]


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of one completion."""

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs]
    finish_reason: str | None
    stop_reason: int | str | None


class DeltaCursor:
    """Remembers how much of one completion was sent."""

    def __init__(self, params: SamplingParams, *, interval: int = 1) -> None:
        """After its first token, a completion waits for ``interval`` more before it goes on."""
        self._interval = interval
        self._stops = () if params.include_stop_str_in_output else params.stop_strings
        self._num_characters = 0
        self._num_tokens = 0
        self._is_finished = False

    def advance(self, completion: Completion) -> Delta | None:
        """None where too little is new; a token without text is something."""
        num_new = len(completion.token_ids) - self._num_tokens
        enough = self._interval if self._num_tokens else 1
        if self._is_finished or not (completion.finish_reason or num_new >= enough):
            return None
        end = len(completion.text)
        if completion.finish_reason is None:
            end = max(self._num_characters, end - self._num_held(completion.text))
        delta = Delta(
            text=completion.text[self._num_characters : end],
            token_ids=completion.token_ids[self._num_tokens :],
            logprobs=(completion.logprobs or ())[self._num_tokens :],
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )
        self._num_characters, self._num_tokens = end, len(completion.token_ids)
        self._is_finished = completion.finish_reason is not None
        return delta

    def _num_held(self, text: str) -> int:
        """Characters at the end that may be the beginning of a stop string, which is never sent."""
        return max((_overlap(text, stop) for stop in self._stops), default=0)


def _overlap(text: str, stop: str) -> int:
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)
