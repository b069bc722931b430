"""Directories of the cache that exist either whole or not at all."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from nanoflow_compiler.errors import ModelLoadError

__all__ = ["build_directory"]


def build_directory(target: Path, build: Callable[[Path], None]) -> Path:
    """Return ``target``, made by ``build(scratch)`` if it is not there yet.

    One process builds while the others wait; ``build`` fills a scratch directory beside the target,
    which takes the target's name only once it is complete. What a killed process left is removed.
    """
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(f".{target.name}.lock"))
        with lock:
            if not target.is_dir():
                _build(target, build)
    except OSError as error:
        raise ModelLoadError(
            f"cannot write the cache {target.parent}: {error}; free space there or set NANOFLOW_CACHE"
        ) from error
    return target


def _build(target: Path, build: Callable[[Path], None]) -> None:
    prefix = f".{target.name}.partial-"
    for leftover in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        content = scratch / "content"
        content.mkdir()  # mkdtemp allows the owner only; the cache follows the user's umask
        build(content)
        content.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
