"""When requests are sent."""

from collections.abc import Sequence
from math import isinf

import numpy as np

from nanoflow_compiler.bench.dataset import BenchRequest

__all__ = ["arrival_times"]


def arrival_times(
    requests: Sequence[BenchRequest], *, rate: float, burstiness: float, seed: int
) -> list[float]:
    """Seconds after the start, of each request in order.

    Gaps are drawn from a gamma distribution of shape ``burstiness``, exponential for 1, and stretched
    so that the last request comes when the rate says. Without a rate, what the dataset says, else
    all at once.
    """
    if isinf(rate):
        return [request.arrival_s or 0.0 for request in requests]
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.gamma(burstiness, 1 / (rate * burstiness), size=len(requests)))
    stretched: list[float] = (times * (len(requests) / rate / times[-1])).tolist()
    return stretched
