"""How a client reaches the loop of an engine: here, one in a thread of the same process."""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Protocol

from nanoflow_compiler.engine.core import EngineCore
from nanoflow_compiler.engine.limits import RequestLimits
from nanoflow_compiler.engine.loop import run_loop
from nanoflow_compiler.engine.messages import Command, Event
from nanoflow_compiler.errors import EngineDeadError

__all__ = ["EngineLink", "OnEvent", "ThreadLink"]

OnEvent = Callable[[Event], None]


class EngineLink(Protocol):
    """An engine that is ready to run."""

    @property
    def limits(self) -> RequestLimits:
        """What may be asked of it."""

    async def open(self, on_event: OnEvent) -> None:
        """Start the loop; ``on_event`` is called on this event loop, in order."""

    def send(self, command: Command) -> None:
        """Returns at once. What is sent to an engine that is gone is lost."""

    async def close(self) -> None:
        """End the engine, and wait until its device is free."""

    async def restart(self) -> None:
        """Start again after the engine died; EngineDeadError if that cannot be."""


class ThreadLink:
    """The loop runs in a thread. It can be opened once."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def limits(self) -> RequestLimits:
        return self.core.limits

    async def open(self, on_event: OnEvent) -> None:
        loop = asyncio.get_running_loop()

        def tell(event: Event) -> None:
            loop.call_soon_threadsafe(on_event, event)

        self._thread = threading.Thread(
            target=run_loop, args=(self.core, self, tell), name="nanoflow-engine", daemon=True
        )
        self._thread.start()

    def send(self, command: Command) -> None:
        self._commands.put(command)

    async def close(self) -> None:
        self.send(Command(close=True))
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    async def restart(self) -> None:
        raise EngineDeadError("an engine in a thread cannot be started again; make a new one")

    def take(self, *, wait: bool) -> Command | None:
        """For the loop."""
        try:
            return self._commands.get(block=wait)
        except queue.Empty:
            return None
