"""The running requests as columns: one row, its *slot*, for each."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nanoflow_compiler.engine.messages import EngineRequest, RequestTimes
from nanoflow_compiler.engine.sampling_columns import SamplingColumns

__all__ = ["EMPTY", "RequestTable"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

EMPTY = -1
"""The key of a slot without a request."""


class RequestTable:
    """Arrays indexed by slot, so that a step's bookkeeping is a few operations on whole arrays.

    A request's tokens pass through three counts: *scheduled* ones, which a submitted step has sampled
    or will; *known* ones, whose values came back; *computed* ones, whose keys and values are stored,
    or will be by a submitted step. In decode known is scheduled or one less, and computed is one
    less than scheduled.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        max_model_len: int,
        block_size: int,
        eos_token_ids: Iterable[int] = (),
        seed: int = 0,
    ) -> None:
        """``seed`` is for requests without one of their own, which then repeat with their key."""

        def column(dtype: npt.DTypeLike = np.int64) -> npt.NDArray[Any]:
            return np.zeros(num_slots, dtype=dtype)

        self.block_size = block_size
        self.requests: list[EngineRequest | None] = [None] * num_slots
        self.keys = np.full(num_slots, EMPTY, dtype=np.int64)
        # Zeros that nobody has touched take no memory.
        self.token_ids = np.zeros((num_slots, max_model_len), dtype=np.int32)
        self.num_prompt: Ints = column()
        self.num_known: Ints = column()
        self.num_scheduled: Ints = column()
        self.num_computed: Ints = column()
        self.num_cached: Ints = column()
        """Tokens that were found in the cache when the request was first admitted."""
        self.arrived_s: Floats = column(np.float64)
        self.admitted_s: Floats = column(np.float64)
        """When its first tokens were put into a step; both by the monotonic clock."""
        self.limit: Ints = column()
        """Tokens at which a request ends for its length, prompt included."""
        self.block_tables = np.zeros((num_slots, -(-max_model_len // block_size)), dtype=np.int32)
        self.num_blocks: Ints = column()
        self.block_names: list[list[bytes]] = [[] for _ in range(num_slots)]
        """Names of the full blocks of known tokens, from the first."""
        self.num_named: Ints = column()
        """Blocks that others can find."""
        self.sampling = SamplingColumns.allocate(num_slots)
        self.eos_token_ids = np.array(sorted(eos_token_ids), dtype=np.int64)
        self.seed = seed
        self.ignores_eos: Bools = column(np.bool_)
        self.has_stop_ids: Bools = column(np.bool_)
        self.has_grammar: Bools = column(np.bool_)
        self.num_prompt_logprobs: Ints = column()
        """-1 is none."""
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_slots(self) -> int:
        return len(self.keys)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def request(self, slot: int) -> EngineRequest:
        """The request in a slot that has one."""
        request = self.requests[slot]
        assert request is not None, f"slot {slot} is empty"
        return request

    def insert(self, request: EngineRequest, *, limit: int, arrived_s: float) -> int:
        """The slot of a new request."""
        slot = self._free.pop()
        prompt = np.asarray(request.prompt_token_ids, dtype=np.int32)
        self.requests[slot] = request
        self.keys[slot] = request.key
        self.token_ids[slot, : len(prompt)] = prompt
        self.num_prompt[slot] = self.num_known[slot] = self.num_scheduled[slot] = len(prompt)
        self.limit[slot] = limit
        self.arrived_s[slot] = arrived_s
        params = request.params
        self.ignores_eos[slot] = params.ignore_eos
        self.has_stop_ids[slot] = bool(params.stop_token_ids)
        self.has_grammar[slot] = params.structured_outputs is not None
        num = params.prompt_logprobs
        self.num_prompt_logprobs[slot] = -1 if num is None else num
        seed = (self.seed << 32) + request.key if params.seed is None else params.seed
        self.sampling.put(slot, params, seed=seed, eos_token_ids=self.eos_token_ids.tolist())
        self.block_names[slot] = []
        self.num_cached[slot] = EMPTY
        return slot

    def remove(self, slot: int) -> None:
        """Empty a slot whose blocks have been taken back."""
        assert self.num_blocks[slot] == 0, f"slot {slot} still has blocks"
        self.requests[slot] = None
        self.keys[slot] = EMPTY
        self.block_names[slot] = []
        self._free.append(slot)

    def times(self, slot: int) -> RequestTimes:
        """Of a request whose first token is known now."""
        arrived_s, admitted_s = float(self.arrived_s[slot]), float(self.admitted_s[slot])
        return RequestTimes(
            queued_s=admitted_s - arrived_s, prefill_s=time.monotonic() - admitted_s
        )

    def blocks(self, slot: int) -> list[int]:
        """The blocks of a request in order."""
        blocks: list[int] = self.block_tables[slot, : self.num_blocks[slot]].tolist()
        return blocks

    def give_blocks(self, slot: int, blocks: Sequence[int]) -> None:
        """Append to the blocks of a request."""
        start = self.num_blocks[slot]
        self.block_tables[slot, start : start + len(blocks)] = blocks
        self.num_blocks[slot] += len(blocks)

    def take_blocks(self, slot: int) -> list[int]:
        """All blocks of a request, which has none afterwards and nothing computed."""
        blocks = self.blocks(slot)
        self.block_tables[slot, : len(blocks)] = 0
        self.num_blocks[slot] = self.num_computed[slot] = self.num_named[slot] = 0
        return blocks

    def append(self, slots: Ints, tokens: Ints) -> None:
        """The values of the tokens that were sampled first of those not known."""
        self.token_ids[slots, self.num_known[slots]] = tokens
        self.num_known[slots] += 1
