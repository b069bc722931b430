"""A device that does nothing for a fixed time, and a runner that notes when the device had to wait."""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanoflow_compiler.engine.batch import Batch
from nanoflow_compiler.engine.logprobs import TopLogprobs
from nanoflow_compiler.engine.runner import ModelRunner, PreparedStep
from nanoflow_compiler.engine.sampled import Sampled
from nanoflow_compiler.engine.sampling_batch import SamplingBatch
from nanoflow_compiler.kv_cache import KVCache

if TYPE_CHECKING:
    from nanoflow_compiler.engine.token_mask import TokenMask

__all__ = ["MeasuredRunner", "SleepStep"]


class SleepStep:
    """A model step that sleeps, and finds no logits.

    It sleeps less by what was left to do after the step before, so that a whole step takes ``seconds``.
    """

    def __init__(self, *, parts: int) -> None:
        self.seconds = 0.0
        self.num_cells = parts
        whole, each = (0, parts), [(part, part + 1) for part in range(parts)]
        self.attention_parts = (whole,) if parts == 1 else (whole, *each)
        self._woke_s = self._rest_s = 0.0

    def __call__(
        self, input_ids: Tensor, positions: Tensor, rows: Tensor, cuts: Sequence[int]
    ) -> Tensor:
        del positions, rows, cuts
        time.sleep(max(0.0, self.seconds - self._rest_s))
        self._woke_s = time.perf_counter()
        return input_ids.new_empty(0)  # nothing is chosen from them

    def on_sampled(self, _: Future[Sampled]) -> None:
        """The step that slept last is done."""
        self._rest_s = time.perf_counter() - self._woke_s

    def close(self) -> None:
        """There is nothing to release."""


class _Answer(Future[Sampled]):
    """Notes for how long its reader was blocked."""

    def __init__(self, inner: Future[Sampled], owner: "MeasuredRunner") -> None:
        super().__init__()
        self._inner, self._owner = inner, owner

    def result(self, timeout: float | None = None) -> Sampled:
        start = time.perf_counter()
        sampled = self._inner.result(timeout)
        self._owner.blocked_s += time.perf_counter() - start
        return sampled


class MeasuredRunner(ModelRunner):
    """The engine's runner, with times taken around it.

    Token 0 is chosen for every request: sampling is the device's work, which is slept for.
    """

    def __init__(self, step: SleepStep, *, cache: KVCache, num_slots: int) -> None:
        super().__init__(step, cache=cache, num_slots=num_slots, is_threaded=True)
        self.blocked_s = 0.0
        """How long the loop has waited for the device."""
        self.num_idle = 0
        """Steps that came when the device had nothing left to do."""
        self._on_sampled = step.on_sampled
        self._last: Future[Sampled] | None = None

    def submit(
        self,
        batch: Batch,
        sampling: SamplingBatch,
        *,
        mask: "Future[TokenMask] | None" = None,
    ) -> Future[Sampled]:
        before = self._last
        self._last = super().submit(batch, sampling, mask=mask)
        # Asked after the new step was handed over: the device was done before it got this one.
        self._last.add_done_callback(self._on_sampled)
        self.num_idle += before is not None and before.done()
        return _Answer(self._last, self)

    def _choose(self, logits: Tensor, prepared: PreparedStep, mask: "TokenMask | None") -> Sampled:
        del logits, mask
        tokens = torch.zeros(prepared.num_sampled, dtype=torch.int64)
        most = int(prepared.sampling.num_logprobs.max(initial=-1))
        if most < 0:
            return Sampled(tokens, None)
        columns = tokens[:, None].expand(-1, 1 + most)
        return Sampled(tokens, TopLogprobs(columns, columns.float(), tokens + 1))
