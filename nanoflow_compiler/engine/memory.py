"""How the memory of a device is divided: weights, the KV cache, and what a step needs beside them."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nanoflow_compiler.engine.step_memory import StepMemory
from nanoflow_compiler.errors import ConfigError
from nanoflow_compiler.hardware import available_memory_bytes

__all__ = ["MemoryBudget", "explain_out_of_memory", "measure_memory"]

GPU_MEMORY_UTILIZATION = 0.9
HOST_SHARE = 0.25
"""Of what is free: the rest is for the activations of a step, and for who else runs there."""
CGROUP = Path("/sys/fs/cgroup")
_GIB = 2**30
_ADVICE = (
    "lower max_num_seqs, max_num_batched_tokens, max_model_len or gpu_memory_utilization, or choose a "
    "dtype of fewer bytes"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """Bytes of one device, before the KV cache is made."""

    limit_bytes: int
    """What may be in use; of a CPU, what is free for the KV cache."""
    weights_bytes: int
    """What torch holds when the step is ready: weights, merged and packed ones included."""
    other_bytes: int = 0
    """What the driver and other processes hold."""
    activation_bytes: int = 0
    """An estimate of what one step needs at most (:class:`StepMemory`)."""
    graph_bytes: int = 0
    """An estimate of what captured graphs keep."""
    device: str = "cpu"

    @property
    def spare_bytes(self) -> int:
        """What is left for the KV cache."""
        if self.device == "cpu":
            return self.limit_bytes
        return max(0, self.limit_bytes - self.taken_bytes)

    @property
    def taken_bytes(self) -> int:
        """All but the KV cache."""
        return self.weights_bytes + self.other_bytes + self.activation_bytes + self.graph_bytes

    @property
    def facts(self) -> dict[str, int]:
        """By name; of a CPU, what there is of it."""
        if self.device == "cpu":
            return {"weights_bytes": self.weights_bytes}
        return {
            "memory_limit_bytes": self.limit_bytes,
            "weights_bytes": self.weights_bytes,
            "activation_bytes": self.activation_bytes,
            "graph_bytes": self.graph_bytes,
            "other_bytes": self.other_bytes,
        }

    def check(self, bytes_per_block: int) -> None:
        """Refuse a budget that leaves no room for a block of the KV cache."""
        if self.spare_bytes >= bytes_per_block:
            return
        raise ConfigError(
            f"no memory is left for the KV cache on {self.device}: of {self.limit_bytes / _GIB:.2f} GiB "
            f"that may be in use, {_listed(self.facts)}; {_advice(self)}"
        )


def measure_memory(
    device: torch.device,
    *,
    weights_bytes: int,
    step: StepMemory,
    gpu_memory_utilization: float | None,
) -> MemoryBudget:
    """``weights_bytes`` counts on a CPU; a GPU is asked for what torch holds there."""
    if device.type == "cpu":
        free = min(available_memory_bytes(), _container_bytes())
        return MemoryBudget(limit_bytes=int(HOST_SHARE * free), weights_bytes=weights_bytes)
    share = GPU_MEMORY_UTILIZATION if gpu_memory_utilization is None else gpu_memory_utilization
    # What was only needed for loading and compiling counts as used until torch gives it back.
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    return MemoryBudget(
        limit_bytes=int(share * total),
        weights_bytes=held,
        other_bytes=max(0, total - free - held),
        activation_bytes=step.activation_bytes,
        graph_bytes=step.graph_bytes,
        device=str(device),
    )


@contextmanager
def explain_out_of_memory(when: str) -> Iterator[None]:
    """An out-of-memory error of torch becomes a :class:`ConfigError` that says what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        found = ". ".join(str(error).strip().split(". ")[:3]).rstrip(".") or "no memory"
        raise ConfigError(f"out of memory {when}: {found}; {_ADVICE}") from error


def _listed(facts: dict[str, int]) -> str:
    parts = [(name.removesuffix("_bytes"), count) for name, count in facts.items()]
    return ", ".join(f"{name} {count / _GIB:.2f}" for name, count in parts[1:])


def _advice(budget: MemoryBudget) -> str:
    if budget.weights_bytes + budget.other_bytes >= budget.limit_bytes:
        return "raise gpu_memory_utilization, or choose a dtype of fewer bytes or a larger device"
    return (
        "raise gpu_memory_utilization, or lower max_num_batched_tokens or max_num_seqs, of which a "
        "step's memory is estimated"
    )


def _container_bytes() -> int:
    """What the limit of a container leaves; no limit is more than any machine has."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
    except OSError:  # no version 2 control group
        return 2**63
    return 2**63 if limit == "max" else max(0, int(limit) - used)
