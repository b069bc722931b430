"""What the planner knows of a device: rates, shares and power."""

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DEVICE_SPECS", "DeviceSpec", "available_memory_bytes", "device_spec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """Rates of one device, as large kernels reach them in sustained runs unless noted.

    A kernel on a share of the SMs keeps that share of the FLOP rate, and of the memory rate
    the smaller of 1 and share / ``memory_sm_share`` (a part of the SMs saturates memory).
    """

    name: str
    num_sms: int
    """Streaming multiprocessors, or cores of a CPU."""
    max_lanes: int
    """Kernels that can usefully run at once; 1 means that overlap is impossible."""
    flops_per_s: dict[str, float]
    """Dense matrix FLOP/s by dtype; ``"float32"`` is always there."""
    memory_bytes_per_s: float
    link_bytes_per_s: float
    """Sum over both directions of the links to the other devices of the node."""
    memory_bytes: float
    launch_us: float
    """Fixed cost of one kernel inside a captured graph (of one call on a CPU)."""
    memory_sm_share: float
    """Share of the SMs that saturates memory with a good kernel."""
    power_cap_watts: float | None = None
    """Sustained power limit, where it is known to bind."""
    idle_watts: float = 0.0
    joules_per_flop: float = 0.0
    """Energy above idle."""
    joules_per_byte: float = 0.0
    """Energy above idle."""

    def flops(self, dtype: str) -> float:
        """Dense FLOP/s for ``dtype`` (``"bfloat16"`` ...), float32's rate for an unknown one."""
        return self.flops_per_s.get(dtype, self.flops_per_s["float32"])


# A100: the NanoFlow paper's Table 1 and its measured GEMM peak (280 TFLOP/s of 312).
_A100 = DeviceSpec(
    name="a100-80gb",
    num_sms=108,
    max_lanes=4,
    flops_per_s={"float16": 280e12, "bfloat16": 280e12, "float32": 19.5e12},
    memory_bytes_per_s=2.0e12,
    link_bytes_per_s=600e9,
    memory_bytes=80e9,
    launch_us=2.0,
    memory_sm_share=0.4,
)

# H100 and H200: measured on SXM cards at their 700 W cap. The four GEMMs of a Llama-3-8B
# layer at M=2048 (893 GFLOP) take 1332 us and 0.93 J on an H200 idling at 121 W, so
# (0.93 - 121 * 1332e-6) / 893e9 J per FLOP; decode attention over 3.22 GB takes 722 us and
# 0.49 J, so (0.49 - 121 * 722e-6) / 3.22e9 J per byte.
_HOPPER_JOULES_PER_FLOP = 0.86e-12
_HOPPER_JOULES_PER_BYTE = 0.125e-9
_H100 = DeviceSpec(
    name="h100-sxm",
    num_sms=132,
    max_lanes=4,
    flops_per_s={"float16": 665e12, "bfloat16": 665e12, "float8": 1250e12, "float32": 60e12},
    memory_bytes_per_s=3.0e12,
    link_bytes_per_s=900e9,
    memory_bytes=80e9,
    launch_us=2.0,
    memory_sm_share=0.34,
    power_cap_watts=700.0,
    idle_watts=121.0,
    joules_per_flop=_HOPPER_JOULES_PER_FLOP,
    joules_per_byte=_HOPPER_JOULES_PER_BYTE,
)
_H200 = DeviceSpec(
    name="h200-sxm",
    num_sms=132,
    max_lanes=4,
    flops_per_s={"float16": 670e12, "bfloat16": 670e12, "float8": 1250e12, "float32": 60e12},
    memory_bytes_per_s=4.4e12,
    link_bytes_per_s=900e9,
    memory_bytes=141e9,
    launch_us=2.0,
    memory_sm_share=0.34,
    power_cap_watts=700.0,
    idle_watts=121.0,
    joules_per_flop=_HOPPER_JOULES_PER_FLOP,
    joules_per_byte=_HOPPER_JOULES_PER_BYTE,
)


def _cpu() -> DeviceSpec:
    """This host: nominal rates per core, good for ratios between plans, not for seconds."""
    cores = len(os.sched_getaffinity(0))
    return DeviceSpec(
        name="cpu",
        num_sms=cores,
        max_lanes=1,  # one thread issues, and every kernel uses all cores
        flops_per_s={"float32": 50e9 * cores, "bfloat16": 50e9 * cores},
        memory_bytes_per_s=min(12e9 * cores, 200e9),
        link_bytes_per_s=10e9,
        memory_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        launch_us=5.0,
        memory_sm_share=1.0,
    )


DEVICE_SPECS: dict[str, DeviceSpec] = {spec.name: spec for spec in (_cpu(), _A100, _H100, _H200)}


def available_memory_bytes() -> int:
    """Memory of this host that new allocations can have without swapping."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
    return int(kib) * 1024


def device_spec(device_type: str, *, device_name: str = "") -> DeviceSpec:
    """The spec that fits a torch device: ``device_type`` as in ``torch.device``, and its name.

    An unknown GPU is planned for as an A100, the smallest of those that we have figures for.
    """
    if device_type != "cuda":
        return DEVICE_SPECS["cpu"]
    for marker, name in (("H200", "h200-sxm"), ("H100", "h100-sxm")):
        if marker in device_name:
            return DEVICE_SPECS[name]
    return DEVICE_SPECS["a100-80gb"]
