"""Traces of real services: lengths of prompts and answers, and times where they were published.

A CSV file with the columns TIMESTAMP, ContextTokens and GeneratedTokens, as the Azure traces have
them. A timestamp is a number of seconds, or a date and time; a column without them (``XXX``) leaves
arrivals open. The prompts are random tokens.
"""

import csv
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import numpy as np

from nanoflow_compiler.bench.dataset import BenchRequest, DatasetSettings, Vocabulary
from nanoflow_compiler.errors import ConfigError

__all__ = ["trace_requests"]

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def trace_requests(settings: DatasetSettings, *, vocabulary: Vocabulary) -> Iterator[BenchRequest]:
    """In the order of the file."""
    rng = np.random.default_rng(settings.seed)
    first: float | None = None
    for time, input_len, output_len in _rows(settings.path):
        first = time if first is None else first
        yield BenchRequest(
            prompt_token_ids=vocabulary.draw(rng, input_len),
            output_len=output_len,
            arrival_s=None if time is None or first is None else max(0.0, time - first),
        )


def _rows(path: Path) -> Iterator[tuple[float | None, int, int]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise ConfigError(f"{path} has no column {missing[0]}; it needs {', '.join(COLUMNS)}")
        for row in reader:
            try:
                lengths = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            except ValueError as error:
                raise ConfigError(f"{path}, line {reader.line_num}: {error}") from error
            if min(lengths) > 0:
                yield _seconds(row["TIMESTAMP"]), *lengths


def _seconds(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
