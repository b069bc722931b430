"""An engine in a process of its own: it loads, compiles and runs the model there.

The two processes talk over ZeroMQ in msgspec's messages. Over a lifeline the parent says what to make,
the engine answers that it is ready, and each sees when the other is gone: the engine then ends at
once, and whoever waits for the engine hears of it.
"""

import asyncio
import logging
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import zmq
import zmq.asyncio

from nanoflow_compiler import errors
from nanoflow_compiler.engine.engine_process import EngineProcess
from nanoflow_compiler.engine.limits import RequestLimits
from nanoflow_compiler.engine.link import OnEvent
from nanoflow_compiler.engine.messages import Command, Event
from nanoflow_compiler.engine.spec import EngineSpec
from nanoflow_compiler.engine.wire import decode_event, encode
from nanoflow_compiler.errors import EngineDeadError, NanoflowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Failed", "Launch", "ProcessLink", "Ready"]

_LOG = logging.getLogger(__name__)

COMMANDS, EVENTS = "commands", "events"
CLOSE_TIMEOUT_S = 10.0
"""For the step under way to end; then the process is killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """The first message, to the engine."""

    spec: EngineSpec
    address: str
    log_level: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The answer of an engine that can take requests."""

    limits: RequestLimits
    tokenizer: "PreTrainedTokenizerBase | None"
    sampling_defaults: Mapping[str, float]
    facts: Mapping[str, Any]
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The answer of one that could not be made."""

    kind: str
    """Name of the error's class."""
    message: str


class ProcessLink:
    """Starts the engine's process on construction, and waits until the model is ready.

    ``early`` is one that was started before. Raises what made the engine impossible, :class:`EngineDeadError` if its process went away.
    """

    def __init__(self, spec: EngineSpec, *, early: EngineProcess | None = None) -> None:
        self.spec = spec
        self._on_event: OnEvent | None = None
        self._start(early)

    @property
    def limits(self) -> RequestLimits:
        return self.ready.limits

    @property
    def pid(self) -> int:
        return self._engine.process.pid

    async def open(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        # Belongs to this event loop, which may not have been there when the process started.
        self._incoming = zmq.asyncio.Socket.shadow(self._events)
        self._receiver = asyncio.create_task(self._receive())
        asyncio.get_running_loop().add_reader(self._engine.lifeline.fileno(), self._on_gone)

    def send(self, command: Command) -> None:
        self._commands.send(encode(command), zmq.DONTWAIT)

    async def close(self) -> None:
        self._detach()
        self.send(Command(close=True))
        try:
            await asyncio.to_thread(self._engine.process.wait, CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            _LOG.warning("the engine did not end in %g s and is killed", CLOSE_TIMEOUT_S)
        self.kill()

    async def restart(self) -> None:
        on_event = self._on_event
        assert on_event is not None, "an engine that was never opened cannot have died"
        await asyncio.to_thread(self._restart)
        await self.open(on_event)

    def kill(self) -> None:
        """End the process now, and let go of what led to it."""
        self._engine.kill()
        self._sockets.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _restart(self) -> None:
        self.kill()
        self._start()

    def _start(self, early: EngineProcess | None = None) -> None:
        # A folder that only this user may enter: whoever reaches the sockets may run anything.
        self._folder = tempfile.mkdtemp(prefix="nanoflow-")
        self._sockets = zmq.Context()
        # The end that sends connects: it may send before the other one is there, and after it is gone.
        self._commands = self._socket(zmq.PUSH)
        self._commands.connect(f"ipc://{self._folder}/{COMMANDS}")
        self._events = self._socket(zmq.PULL)
        self._events.bind(f"ipc://{self._folder}/{EVENTS}")
        self._engine = early or EngineProcess.start()
        try:
            self.ready = self._handshake()
        except BaseException:
            self.kill()
            raise

    def _socket(self, kind: int) -> "zmq.Socket[bytes]":
        socket = self._sockets.socket(kind)
        socket.set_hwm(0)  # nothing that was sent is dropped
        return socket

    def _handshake(self) -> Ready:
        level = logging.getLogger().getEffectiveLevel()
        try:
            launch = Launch(spec=self.spec, address=f"ipc://{self._folder}", log_level=level)
            self._engine.lifeline.send(launch)
            answer = self._engine.lifeline.receive()
        except (EOFError, BrokenPipeError) as error:
            raise EngineDeadError(f"{self._why_gone()} while it started") from error
        if isinstance(answer, Failed):
            raise _as_error(answer)
        assert isinstance(answer, Ready)
        return answer

    async def _receive(self) -> None:
        assert self._on_event is not None
        while True:
            self._on_event(decode_event(await self._incoming.recv()))

    def _detach(self) -> None:
        asyncio.get_running_loop().remove_reader(self._engine.lifeline.fileno())
        self._receiver.cancel()
        self._incoming.close(linger=0)

    def _on_gone(self) -> None:
        """The lifeline can be read: nothing but its end comes there. Its last events come first."""
        assert self._on_event is not None
        with suppress(zmq.Again):
            while True:
                self._on_event(decode_event(self._events.recv(zmq.DONTWAIT)))
        self._detach()
        self._on_event(Event(error=self._why_gone()))

    def _why_gone(self) -> str:
        code = self._engine.process.wait()
        if code >= 0:
            return f"the engine process ended with code {code}; its last lines above say why"
        name = signal.Signals(-code).name
        hint = "; without memory, Linux kills who uses most" if -code == signal.SIGKILL else ""
        return f"the engine process was killed by {name}{hint}"


def _as_error(failed: Failed) -> NanoflowError:
    """The error that the engine met, as if it had been met here."""
    kind = getattr(errors, failed.kind, None)
    if kind is None or kind is errors.InvalidProgramError:
        return EngineDeadError(f"the engine could not start: {failed.kind}: {failed.message}")
    error: NanoflowError = kind(failed.message)
    return error
