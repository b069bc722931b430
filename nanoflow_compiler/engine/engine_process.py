"""The process of an engine, from before it is known what engine it will be.

What it imports takes as long as what its parent does: begun at once, both import side by side. It then waits
to be told what to make; when its parent goes away before that, it ends without a word.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nanoflow_compiler.engine.lifeline import Lifeline, make_pair

__all__ = ["EngineProcess"]


@dataclass(frozen=True, slots=True)
class EngineProcess:
    """One that was started, and this end of what leads to it."""

    process: "subprocess.Popen[bytes]"
    lifeline: Lifeline

    @classmethod
    def start(cls) -> "EngineProcess":
        """Returns at once."""
        lifeline, there = make_pair()
        with there:
            command = [sys.executable, "-m", "nanoflow_compiler.engine.process_main"]
            process = subprocess.Popen(
                [*command, str(there.fileno())],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
            )
        return cls(process, lifeline)

    @classmethod
    @contextmanager
    def early(cls) -> Iterator["EngineProcess"]:
        """One that is gone at the end, whatever it was used for; in the main thread only."""
        # As the process itself will do when it has imported what it needs.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            started = cls.start()
        finally:
            signal.signal(signal.SIGINT, before)
        try:
            yield started
        finally:
            started.kill()

    def kill(self) -> None:
        """End the process now, if it has not ended."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.lifeline.close()
