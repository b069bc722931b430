"""Results as people and programs read them."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from nanoflow_compiler.bench.environment import environment
from nanoflow_compiler.errors import ConfigError

__all__ = [
    "PERCENTILES",
    "check_writable",
    "count_results",
    "percentiles",
    "print_rows",
    "write_json",
]

PERCENTILES = (10, 25, 50, 75, 90, 99)


def count_results(
    *, num_requests: int, num_input: int, num_output: int, seconds: float
) -> dict[str, Any]:
    """Counts and rates, with vLLM's keys where it has them."""
    total = num_input + num_output
    return {
        "elapsed_time": seconds,
        "num_requests": num_requests,
        "total_num_tokens": total,
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "requests_per_second": num_requests / seconds,
        "tokens_per_second": total / seconds,
        "output_tokens_per_second": num_output / seconds,
    }


def percentiles(values: Sequence[float], ranks: Sequence[float] = PERCENTILES) -> dict[str, float]:
    """By their rank, as JSON has it for a key."""
    return {f"{rank:g}": float(np.percentile(values, rank)) for rank in ranks}


def print_rows(rows: Mapping[str, object]) -> None:
    """A table of two columns, on standard output."""
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    Console().print(table)


def check_writable(path: Path | None) -> None:
    """Before anything is measured: a result that cannot be kept is not worth the wait."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path.parent} cannot be made: {error.strerror}") from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written; choose another file")


def write_json(
    path: Path | None,
    results: Mapping[str, Any],
    *,
    settings: Mapping[str, Any],
    threads: int | None = None,
) -> None:
    """Results at the top, as vLLM has them, with the settings and where they were measured."""
    if path is None:
        return
    plain = {name: _plain(value) for name, value in settings.items()}
    report = {**results, "settings": plain, "environment": environment(threads)}
    path.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")


def _plain(value: object) -> object:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
