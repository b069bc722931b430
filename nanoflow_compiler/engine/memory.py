"""How much memory a device has to spare for the KV cache, once the weights are there."""

from pathlib import Path

import torch

from nanoflow_compiler.hardware import available_memory_bytes

__all__ = ["spare_bytes"]

GPU_MEMORY_UTILIZATION = 0.9
HOST_SHARE = 0.25
"""Of what is free: the rest is for the activations of a step, and for who else runs there."""
CGROUP = Path("/sys/fs/cgroup")


def spare_bytes(device: torch.device, *, gpu_memory_utilization: float | None) -> int:
    """Of a GPU, what is left of the fraction that may be used; of a CPU, a quarter of what is free."""
    if device.type == "cpu":
        return int(HOST_SHARE * min(available_memory_bytes(), _container_bytes()))
    share = GPU_MEMORY_UTILIZATION if gpu_memory_utilization is None else gpu_memory_utilization
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(share * total) - (total - free))


def _container_bytes() -> int:
    """What the limit of a container leaves; no limit is more than any machine has."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
    except OSError:  # no version 2 control group
        return 2**63
    return 2**63 if limit == "max" else max(0, int(limit) - used)
