"""Choosing tokens on one GPU, sustained, with joules and clocks.

    python benchmarks/sampler.py --output benchmarks/results/NAME.json

Random normal logits in float32 with a standard deviation of 2, far flatter than those of a model: a
top_p of 0.9 keeps a quarter of the tokens. Tokens of some rows are compared with the CPU's first.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanoflow_compiler.bench.environment import environment
from nanoflow_compiler.bench.sustained import measure_sustained
from nanoflow_compiler.engine.draw import Draw, draw
from nanoflow_compiler.engine.noise import row_keys
from nanoflow_compiler.kernels.choose import choose_tokens

NUM_TOKENS = 128_256
ROWS = (1, 64, 1024)
SETTINGS: dict[str, Mapping[str, float]] = {
    "greedy": {"temperature": 0},
    "temperature": {},
    "min_p": {"min_p": 0.05},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "top_k and top_p": {"top_k": 50, "top_p": 0.9},
}
MIXED = "mixed"
"""Row by row all of the others."""
NUM_CHECKED = 14
CACHE_BYTES = 200 << 20
"""Several logits that together are larger than any second-level cache."""


def main() -> None:
    """Print a table, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results = []
    for num_rows in ROWS:
        logits = make_logits(num_rows)
        for name in (*SETTINGS, MIXED):
            row = {"rows": num_rows, "settings": name}
            row |= measure(logits, make_columns(num_rows, name), seconds=options.seconds)
            results.append(row)
            print_row(row)
    if options.output:
        report = {**environment(), "num_tokens": NUM_TOKENS, "results": results}
        options.output.write_text(json.dumps(report, indent=1) + "\n")


def make_logits(num_rows: int) -> list[torch.Tensor]:
    """One for each call of a graph; a call finds none of its own in the cache."""
    num_calls = max(2, CACHE_BYTES // (4 * num_rows * NUM_TOKENS))
    return [torch.randn(num_rows, NUM_TOKENS, device="cuda") * 2 for _ in range(num_calls)]


def make_columns(num_rows: int, name: str) -> list[torch.Tensor]:
    """Settings of all rows, on the CPU."""
    plain = {"temperature": 1.0, "min_p": 0.0, "top_k": NUM_TOKENS, "top_p": 1.0}
    kinds = list(SETTINGS.values()) if name == MIXED else [SETTINGS[name]]
    rows = [plain | dict(kinds[row % len(kinds)]) for row in range(num_rows)]
    with np.errstate(divide="ignore"):
        least = np.log(np.array([row["min_p"] for row in rows], dtype=np.float32))
    numbers = np.arange(num_rows).astype(np.uint64)
    arrays = (
        np.array([row["temperature"] for row in rows], dtype=np.float32),
        least,
        np.array([row["top_k"] for row in rows], dtype=np.int64),
        np.array([row["top_p"] for row in rows], dtype=np.float64),
        *row_keys(numbers, numbers),
    )
    return [torch.from_numpy(array) for array in arrays]


def measure(
    logits: list[torch.Tensor], columns: list[torch.Tensor], *, seconds: float
) -> dict[str, Any]:
    """Time and energy of choosing, and how many of the checked rows differ from the CPU's."""
    settings = Draw(*(column.cuda() for column in columns))
    differing = num_differing(logits[0], columns, found=choose_tokens(logits[0], settings))

    def call(own: torch.Tensor) -> None:
        choose_tokens(own, settings)

    time = measure_sustained([lambda own=own: call(own) for own in logits], seconds=seconds)
    rate = {"tb_per_s_of_one_read": logits[0].nbytes / time.us / 1e6, "differing": differing}
    return {**asdict(time), **rate}


def num_differing(logits: torch.Tensor, columns: list[torch.Tensor], *, found: torch.Tensor) -> int:
    """Of the first rows; roundings may make it one, rarely."""
    logits = logits[:NUM_CHECKED].cpu()
    own = [column[:NUM_CHECKED, None] for column in columns]
    temperature = own[0].clamp(min=1e-30)
    drawn = draw(logits, Draw(temperature, *own[1:]), num_ordered=NUM_TOKENS)
    expected = torch.where(own[0][:, 0] > 0, drawn, logits.argmax(-1))
    return int((expected != found[:NUM_CHECKED].cpu()).sum())


def print_row(row: dict[str, Any]) -> None:
    """One line."""
    print(
        f"{row['rows']:>5} rows {row['settings']:<16} {row['us']:8.1f} us "
        f"{row['tb_per_s_of_one_read']:5.2f} TB/s of one read {row['joules']:7.4f} J "
        f"{row['watts']:4.0f} W {row['sm_mhz']:5.0f} MHz, {row['differing']} differ",
        flush=True,
    )


if __name__ == "__main__":
    main()
