"""Progress bars for slow steps: on a terminal only, on standard error, gone when done."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

__all__ = ["Bar", "progress_bar"]

logger = logging.getLogger(__name__)


class Bar:
    """One line of progress; ``total=None`` pulses."""

    def __init__(self, progress: Progress, label: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(label, total=total)

    def advance(self, steps: int = 1) -> None:
        """Move on by ``steps``."""
        self._progress.advance(self._task, steps)

    def set(self, completed: int) -> None:
        """Move to ``completed``."""
        self._progress.update(self._task, completed=completed)


@contextmanager
def progress_bar(label: str, *, total: int | None = None, in_bytes: bool = False) -> Iterator[Bar]:
    """A bar that lives as long as the block; the log tells what started where there is no terminal."""
    console = Console(stderr=True)
    logger.info("%s ...", label)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *_columns(total, in_bytes=in_bytes),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        yield Bar(progress, label, total)


def _columns(total: int | None, *, in_bytes: bool) -> tuple[ProgressColumn, ...]:
    if in_bytes:
        return DownloadColumn(), TransferSpeedColumn()
    return () if total is None else (MofNCompleteColumn(),)
