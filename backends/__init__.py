"""Backends: each turns a Program and its unit (operations and graph) into something to call.

A backend is one file with ``build(program, *, unit, kernels, clusters, path, budgets) -> Executable``,
and one row in the table below. They are imported when asked for, so the package itself touches no device.
"""

if __name__ != "nanoflow_compiler.backends":
    raise ImportError(f"import nanoflow_compiler.backends, not {__name__}: one copy only")

from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from nanoflow_compiler.errors import ConfigError

__all__ = ["BACKENDS", "Backend", "Executable", "get_backend"]

BACKENDS = {
    "codegen": "nanoflow_compiler.backends.codegen",
    "streams": "nanoflow_compiler.backends.streams",
    "cuda_graph": "nanoflow_compiler.backends.cuda_graph",
    "reference": "nanoflow_compiler.backends.reference",
}


class Executable(Protocol):
    """A program that can run."""

    source: str
    """The generated Python, or the program's text where nothing is generated."""
    num_cells: int
    attention_parts: tuple[tuple[int, int], ...]
    """The cells of each ``part`` that attention is called with; part 0 is all cells."""

    def __call__(self, inputs: list[Any], cuts: tuple[int, ...]) -> list[Any]:
        """Outputs in the order of the graph, for the values of ``program.inputs``.

        ``cuts`` are the ``num_cells + 1`` token offsets at which cells begin and end.
        """

    def close(self) -> None:
        """Release what the executable holds; it must not be called afterwards."""


class Backend(Protocol):
    """What a backend's module offers."""

    def build(
        self,
        program: Any,
        *,
        unit: Any,
        kernels: Any,
        clusters: str,
        path: Path | None,
        budgets: Any,
    ) -> Executable:
        """The executable of ``program``.

        ``kernels`` are compiled clusters to share between programs, ``clusters`` says whether to
        use them (``inductor``) or plain ATen (``eager``), ``path`` is where to keep the source, ``budgets``
        say what a launch on a share of the device means.
        """


def get_backend(name: str) -> Backend:
    """The backend of that name."""
    if name not in BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, not {name!r}")
    return cast("Backend", import_module(BACKENDS[name]))
