"""``AsyncEngine``: many callers, one engine loop in a thread of its own."""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from transformers import PreTrainedTokenizerBase

from nanoflow_compiler.engine.core import EngineCore
from nanoflow_compiler.engine.messages import EngineRequest, EngineStats, StepOutput
from nanoflow_compiler.engine.output_processor import Answer, OutputProcessor
from nanoflow_compiler.engine.outputs import RequestOutput
from nanoflow_compiler.engine.prompt import TokensPrompt
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.errors import EngineClosedError, EngineDeadError, RequestError

__all__ = ["AsyncEngine"]

_LOG = logging.getLogger(__name__)

Command = Sequence[EngineRequest | int] | None
"""Requests to add, keys to abort, or the end."""


@dataclass(slots=True, eq=False)
class _Stream:
    """One caller who waits for news."""

    answer: Answer
    news: asyncio.Event = field(default_factory=asyncio.Event)


class AsyncEngine:
    """An async context manager; ``generate`` is an async iterator, and leaving it early aborts.

    The loop of the engine runs in a thread: it takes commands between steps and hands what each
    step found to the event loop, where text is made of it. A caller who is slow misses nothing:
    outputs are cumulative, and what he did not fetch is in the next one.
    """

    def __init__(
        self,
        core: EngineCore,
        *,
        model_name: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.model_name = model_name
        self.tokenizer = tokenizer
        self.max_model_len = core.max_model_len
        self._core = core
        self._processor = OutputProcessor(tokenizer)
        self._streams: dict[str, _Stream] = {}
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._is_open = False
        self._thread = threading.Thread(target=self._run, name="nanoflow-engine", daemon=True)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._is_open = True
        self._thread.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Abort what runs, and release the device."""
        for request_id in list(self._streams):
            await self.abort(request_id)
        self._is_open = False
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    @property
    def errored(self) -> bool:
        """Whether the engine is gone."""
        return self._error is not None

    @property
    def is_running(self) -> bool:
        """Whether the engine takes requests."""
        return self._is_open and not self.errored

    async def generate(
        self,
        prompt: TokensPrompt,
        params: SamplingParams,
        *,
        request_id: str,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The answer as it grows; the last output is finished.

        Raises :class:`RequestError`, :class:`OutOfBlocksError` and :class:`ConfigError` before the
        first output, and :class:`EngineDeadError` at any time.
        """
        self._check_alive()
        if request_id in self._streams:
            raise RequestError(f"request id {request_id!r} is in use; choose another")
        answer = self._processor.answer(prompt["prompt_token_ids"], params, request_id=request_id)
        for request in answer.requests:
            self._core.check(request)
        stream = self._streams[request_id] = _Stream(answer)
        self._processor.open(answer)
        self._commands.put(answer.requests)
        try:
            while not answer.finished:
                await stream.news.wait()
                stream.news.clear()
                self._check_alive()
                yield answer.output()
        finally:
            del self._streams[request_id]
            self._drop(answer)

    async def abort(self, request_id: str) -> None:
        """End a request with the finish reason ``abort``; an unknown one is left alone."""
        if (stream := self._streams.get(request_id)) is not None:
            self._drop(stream.answer)
            stream.answer.abort()
            stream.news.set()

    async def stats(self) -> EngineStats:
        """Counts of now and since the start."""
        self._check_alive()
        return self._core.stats()

    def _check_alive(self) -> None:
        if self._error is not None:
            raise EngineDeadError(f"the engine stopped: {self._error}") from self._error
        if not self._is_open:
            raise EngineClosedError("this engine is closed; open it with `async with`")

    def _drop(self, answer: Answer) -> None:
        if keys := self._processor.close(answer):
            self._commands.put(keys)

    def _on_output(self, output: StepOutput) -> None:
        grown, stopped = self._processor.process(output)
        if stopped:
            self._commands.put(stopped)
        for answer in grown:
            if (stream := self._streams.get(answer.request_id)) is not None:
                stream.news.set()

    def _on_death(self, error: BaseException) -> None:
        self._error = error
        _LOG.error("the engine stopped: %s", error, exc_info=error)
        for stream in self._streams.values():
            stream.news.set()

    def _run(self) -> None:
        """What the thread does, until it is told to end or a step fails."""
        try:
            while self._obey(wait=not self._core.has_requests):
                if (output := self._core.step()) is not None:
                    self._loop.call_soon_threadsafe(self._on_output, output)
        except Exception as error:
            self._loop.call_soon_threadsafe(self._on_death, error)
        finally:
            self._core.close()

    def _obey(self, *, wait: bool) -> bool:
        """Take the commands that came; False at the end."""
        while wait or not self._commands.empty():
            command = self._commands.get()
            wait = False
            if command is None:
                return False
            for item in command:
                if isinstance(item, EngineRequest):
                    self._core.add(item)
                else:
                    self._core.abort([item])
        return True
