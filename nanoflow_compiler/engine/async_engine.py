"""``AsyncEngine``: many callers, one engine, in a process of its own or in a thread."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Self

from nanoflow_compiler.engine.link import EngineLink
from nanoflow_compiler.engine.messages import Command, EngineStats, Event
from nanoflow_compiler.engine.output_processor import Answer, OutputProcessor
from nanoflow_compiler.engine.outputs import RequestOutput
from nanoflow_compiler.engine.prompt import TokensPrompt
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.errors import (
    ConfigError,
    EngineClosedError,
    EngineDeadError,
    NanoflowError,
    RequestError,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nanoflow_compiler.engine.spec import EngineSpec

__all__ = ["AsyncEngine"]

_LOG = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Stream:
    """One caller who waits for news."""

    answer: Answer
    news: asyncio.Event = field(default_factory=asyncio.Event)


class AsyncEngine:
    """An async context manager; ``generate`` is an async iterator, and leaving it early aborts.

    What the engine finds in a step becomes text on the event loop. A caller who is slow misses
    nothing: outputs are cumulative, and what he did not fetch is in the next one.
    """

    def __init__(
        self,
        link: EngineLink,
        *,
        model_name: str,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        sampling_defaults: Mapping[str, float] | None = None,
        max_restarts: int = 0,
    ) -> None:
        """``max_restarts``: how often an engine that died is started again, with none of its requests."""
        self.link = link
        self.model_name = model_name
        self.tokenizer = tokenizer
        self.sampling_defaults: Mapping[str, float] = sampling_defaults or {}
        """What the model recommends; whoever makes SamplingParams decides."""
        self._restarts_left = max_restarts
        self._processor = OutputProcessor(tokenizer)
        self._streams: dict[str, _Stream] = {}
        self._stats: EngineStats | None = None
        self._first_event = asyncio.Event()
        self._error: str | None = None
        self._is_open = False
        self._restart: asyncio.Task[None] | None = None

    @classmethod
    def launch(cls, spec: "EngineSpec", *, max_restarts: int = 0) -> Self:
        """An engine in a process of its own; returns when its model is ready.

        Raises what stands against it: ConfigError, ModelLoadError, EngineDeadError ...
        """
        try:
            from nanoflow_compiler.engine.process import ProcessLink
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{error.name} is missing; install it with: pip install 'nanoflow-compiler[server]'"
            ) from error
        link = ProcessLink(spec)
        return cls(
            link,
            model_name=spec.model,
            tokenizer=link.ready.tokenizer,
            sampling_defaults=link.ready.sampling_defaults,
            max_restarts=max_restarts,
        )

    @property
    def max_model_len(self) -> int:
        return self.link.limits.max_model_len

    @property
    def block_size(self) -> int:
        return self.link.limits.block_size

    async def __aenter__(self) -> Self:
        await self.link.open(self._on_event)
        self._is_open = True
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
        if self._restart is not None:
            self._restart.cancel()
            await asyncio.gather(self._restart, return_exceptions=True)
        await self.link.close()

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
            self.link.limits.check(request)
        stream = self._streams[request_id] = _Stream(answer)
        self._processor.open(answer)
        self.link.send(Command(add=answer.requests))
        try:
            while not answer.finished:
                await stream.news.wait()
                stream.news.clear()
                if not answer.finished:
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
        await self._first_event.wait()
        self._check_alive()
        assert self._stats is not None, "an engine that lives begins with its counts"
        return self._stats

    def _check_alive(self) -> None:
        if self._error is not None:
            raise EngineDeadError(self._error)
        if not self._is_open:
            raise EngineClosedError("this engine is closed; open it with `async with`")

    def _drop(self, answer: Answer) -> None:
        keys = self._processor.close(answer)
        if keys and not self.errored:
            self.link.send(Command(abort=keys))

    def _on_event(self, event: Event) -> None:
        self._stats = event.stats or self._stats
        self._first_event.set()
        if event.error is not None:
            self._on_death(event.error)
        if event.output is None:
            return
        grown, stopped = self._processor.process(event.output)
        if stopped:
            self.link.send(Command(abort=stopped))
        for answer in grown:
            if (stream := self._streams.get(answer.request_id)) is not None:
                stream.news.set()

    def _on_death(self, error: str) -> None:
        """Of the two things that are told of a death, what failed and that the process ended, the first."""
        if self.errored or not self._is_open:
            return
        self._error = f"the engine stopped: {error}"
        for stream in self._streams.values():
            stream.news.set()
        if self._restarts_left > 0:
            self._restarts_left -= 1
            _LOG.error("%s; it is started again", self._error)
            self._restart = asyncio.create_task(self._start_again())
        else:
            _LOG.error("%s; no request can be answered any more", self._error)

    async def _start_again(self) -> None:
        try:
            await self.link.restart()
        except NanoflowError as error:
            _LOG.error("the engine could not be started again: %s", error)
            return
        _LOG.info("the engine is back, after %d requests were lost", len(self._streams))
        self._error = None
