"""The sampling settings of the running requests: arrays indexed by slot."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

from nanoflow_compiler.engine.sampling_params import SamplingParams

__all__ = ["SamplingColumns"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingColumns:
    """One row for each request that may run; what few requests have lies in mappings by slot."""

    temperature: Floats
    top_k: Ints
    top_p: Floats
    min_p: Floats
    repetition: Floats
    presence: Floats
    frequency: Floats
    has_penalties: npt.NDArray[np.bool_]
    seeds: npt.NDArray[np.uint64]
    min_tokens: Ints
    num_logprobs: Ints
    """-1 is none."""
    has_bias: npt.NDArray[np.bool_]
    has_allowed: npt.NDArray[np.bool_]
    ends: dict[int, Ints] = field(default_factory=dict)
    """Tokens that would end the request, of those with ``min_tokens``."""
    bias: dict[int, tuple[Ints, Floats]] = field(default_factory=dict)
    allowed: dict[int, Ints] = field(default_factory=dict)
    """The only tokens that may be chosen, where not all may."""

    @classmethod
    def allocate(cls, num_slots: int) -> Self:
        def floats() -> Floats:
            return np.zeros(num_slots, dtype=np.float32)

        def integers() -> Ints:
            return np.zeros(num_slots, dtype=np.int64)

        return cls(
            temperature=floats(),
            top_k=integers(),
            top_p=floats(),
            min_p=floats(),
            repetition=floats(),
            presence=floats(),
            frequency=floats(),
            has_penalties=np.zeros(num_slots, dtype=np.bool_),
            seeds=np.zeros(num_slots, dtype=np.uint64),
            min_tokens=integers(),
            num_logprobs=integers(),
            has_bias=np.zeros(num_slots, dtype=np.bool_),
            has_allowed=np.zeros(num_slots, dtype=np.bool_),
        )

    def put(
        self, slot: int, params: SamplingParams, *, seed: int, eos_token_ids: Iterable[int]
    ) -> None:
        """Set the whole row of a request, whoever had the slot before."""
        self.temperature[slot] = params.temperature
        self.top_k[slot] = min(params.top_k, np.iinfo(np.int64).max)
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.repetition[slot] = params.repetition_penalty
        self.presence[slot] = params.presence_penalty
        self.frequency[slot] = params.frequency_penalty
        self.has_penalties[slot] = params.has_penalties
        self.seeds[slot] = int(seed) % 2**64
        self.min_tokens[slot] = params.min_tokens
        self.num_logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self._put_rare(slot, params, eos_token_ids=eos_token_ids)

    def _put_rare(self, slot: int, params: SamplingParams, *, eos_token_ids: Iterable[int]) -> None:
        self.ends.pop(slot, None)
        self.bias.pop(slot, None)
        self.allowed.pop(slot, None)
        if params.min_tokens:
            ends = {*eos_token_ids, *(params.stop_token_ids or ())}
            self.ends[slot] = np.array(sorted(ends), dtype=np.int64)
        self.has_bias[slot] = bool(params.logit_bias)
        if params.logit_bias:
            tokens = np.array(list(params.logit_bias), dtype=np.int64)
            self.bias[slot] = tokens, np.array(list(params.logit_bias.values()), dtype=np.float32)
        self.has_allowed[slot] = params.allowed_token_ids is not None
        if params.allowed_token_ids is not None:
            self.allowed[slot] = np.array(params.allowed_token_ids, dtype=np.int64)
