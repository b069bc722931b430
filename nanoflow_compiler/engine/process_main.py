"""What the process of an engine runs: ``python -m nanoflow_compiler.engine.process_main FD``."""

import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
from importlib import import_module

import zmq

from nanoflow_compiler.engine.build import BuiltEngine
from nanoflow_compiler.engine.lifeline import Lifeline
from nanoflow_compiler.engine.loop import run_loop
from nanoflow_compiler.engine.messages import Command, Event
from nanoflow_compiler.engine.process import COMMANDS, EVENTS, Failed, Launch, Ready
from nanoflow_compiler.engine.wire import decode_command, encode
from nanoflow_compiler.errors import NanoflowError

__all__ = ["main"]

LINGER_MS = 1000
"""For the last words to reach a parent that may be gone."""

_LOG = logging.getLogger(__name__)


class _Inbox:
    """Commands from the socket."""

    def __init__(self, commands: "zmq.Socket[bytes]") -> None:
        self._commands = commands

    def take(self, *, wait: bool) -> Command | None:
        if not wait and not self._commands.poll(0):
            return None
        return decode_command(self._commands.recv())


def main(descriptor: int) -> None:
    """Make the engine that the parent asks for, and run it until the parent says so or is gone."""
    # The parent decides when to end, also when a terminal sends its signal to both.
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    lifeline = Lifeline(socket.socket(fileno=descriptor))
    if not select.select([lifeline], [], [], 0)[0]:
        # Started before its parent had imported what it needs: time for what almost all engines need.
        import_module("nanoflow_compiler.packed")
    try:
        launch: Launch = lifeline.receive()
    except EOFError:  # whoever started it thought better of it
        sys.exit(1)
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    logging.basicConfig(
        level=launch.log_level, format="%(asctime)s engine: %(message)s", stream=sys.stderr
    )
    built = _build(launch, lifeline)
    # What is there now stays: a collection that walked through it would hold up a step.
    gc.collect()
    gc.freeze()
    with zmq.Context() as context:
        commands, events = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        for end in (commands, events):
            end.set_hwm(0)
            end.linger = LINGER_MS
        commands.bind(f"{launch.address}/{COMMANDS}")
        events.connect(f"{launch.address}/{EVENTS}")

        def tell(event: Event) -> None:
            events.send(encode(event))

        with commands, events:
            run_loop(built.core, _Inbox(commands), tell)


def _build(launch: Launch, lifeline: Lifeline) -> BuiltEngine:
    try:
        built = launch.spec.build()
    except NanoflowError as error:
        lifeline.send(Failed(kind=type(error).__name__, message=str(error)))
        sys.exit(1)
    except Exception as error:
        _LOG.exception("the engine could not start")
        lifeline.send(Failed(kind=type(error).__name__, message=str(error)))
        sys.exit(1)
    lifeline.send(
        Ready(
            limits=built.core.limits,
            tokenizer=built.tokenizer,
            sampling_defaults=built.sampling_defaults,
            facts=built.facts,
            seconds=_seconds(built),
        )
    )
    return built


def _seconds(built: BuiltEngine) -> dict[str, float]:
    parts = {f"compile: {name}": seconds for name, seconds in built.compile_seconds.items()}
    return {**built.seconds, **parts}


def _end_with_parent(lifeline: Lifeline) -> None:
    try:
        lifeline.receive()
    except EOFError:
        os._exit(1)  # whatever the other threads do


if __name__ == "__main__":
    main(int(sys.argv[1]))
