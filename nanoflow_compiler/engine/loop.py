"""Runs an engine: commands in, events out, a step in between, whichever way they travel."""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from nanoflow_compiler.engine.core import EngineCore
from nanoflow_compiler.engine.memory import explain_out_of_memory
from nanoflow_compiler.engine.messages import (
    NO_TOKEN,
    Command,
    EngineRequest,
    Event,
    StepOutput,
)
from nanoflow_compiler.errors import NanoflowError

__all__ = ["Inbox", "run_loop"]

_LOG = logging.getLogger(__name__)


class Inbox(Protocol):
    """Commands in the order in which they were sent."""

    def take(self, *, wait: bool) -> Command | None:
        """The next one; None if there is none and the caller does not wait."""


def run_loop(core: EngineCore, inbox: Inbox, tell: Callable[[Event], None]) -> None:
    """Returns when a command says so, or when a step fails; the core is closed then."""
    tell(Event(stats=core.stats()))
    try:
        with explain_out_of_memory("in a step"):
            _run(core, inbox, tell)
    except Exception as error:  # whatever it is, those who wait must hear of it
        _LOG.error("the engine stopped: %s", error, exc_info=error)
        tell(Event(error=" ".join(f"{type(error).__name__}: {error}".split())))
    finally:
        core.close()


def _run(core: EngineCore, inbox: Inbox, tell: Callable[[Event], None]) -> None:
    while True:
        command = inbox.take(wait=not core.has_requests)
        if command is None:
            output = core.step()
            tell(Event(stats=core.stats(), output=output))
        elif command.close:
            break
        else:
            refused = _add(core, command.add)
            core.abort(command.abort)
            tell(Event(stats=core.stats(), output=refused))


def _add(core: EngineCore, requests: Sequence[EngineRequest]) -> StepOutput | None:
    """Clients check before they send, but one that did not must not end the engine for all."""
    refused: dict[int, str] = {}
    for request in requests:
        try:
            core.add(request)
        except NanoflowError as error:
            refused[request.key] = str(error)
    if not refused:
        return None
    return StepOutput(
        keys=list(refused),
        tokens=[NO_TOKEN] * len(refused),
        finish_reasons=dict.fromkeys(refused, "error"),
        errors=refused,
    )
