"""What all commands share: flags that come in groups, ``--verbose``, and errors of one line."""

import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_type_hints

import typer

from nanoflow_compiler.errors import NanoflowError

__all__ = ["command"]

Verbose = Annotated[bool, typer.Option("--verbose", help="Log progress; show tracebacks.")]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """What typer is to see of a function: parameters that are dataclasses become a flag for each field.

    So flags that several commands share are written once. All commands have ``--verbose``.
    """
    parameters = signature(function).parameters
    groups = {name: one.annotation for name, one in parameters.items() if _is_group(one)}
    flags = [flag for one in parameters.values() for flag in _flags(one)]
    verbose_flag = _keyword("verbose", Verbose, default=False)

    @wraps(function)
    def run(*, verbose: bool, **given: Any) -> None:
        with _errors_as_one_line(verbose=verbose):
            for name, group in groups.items():
                own = {field.name: given.pop(field.name) for field in fields(group)}
                given[name] = group(**own)
            function(**given)

    run.__signature__ = Signature([*flags, verbose_flag])  # type: ignore[attr-defined]
    return run


def _is_group(parameter: Parameter) -> bool:
    return is_dataclass(parameter.annotation)


def _flags(parameter: Parameter) -> Iterator[Parameter]:
    if not _is_group(parameter):
        yield _keyword(parameter.name, parameter.annotation, default=parameter.default)
        return
    hints = get_type_hints(parameter.annotation, include_extras=True)
    for field in fields(parameter.annotation):
        default = Parameter.empty if field.default is MISSING else field.default
        yield _keyword(field.name, hints[field.name], default=default)


def _keyword(name: str, annotation: Any, *, default: object) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


@contextmanager
def _errors_as_one_line(*, verbose: bool) -> Iterator[None]:
    """Our own errors tell a user what to do: their traceback would only hide it."""
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        yield
    except NanoflowError as error:
        if verbose:
            traceback.print_exc()
        typer.echo(f"nanoflow: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error
