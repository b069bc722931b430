"""What every endpoint works with."""

import logging
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import cast

from starlette.requests import Request

from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.errors import ConfigError, OutOfBlocksError, RequestError
from nanoflow_compiler.server.admission import Admission
from nanoflow_compiler.server.engine_client import EngineClient, Output
from nanoflow_compiler.server.errors import ApiError
from nanoflow_compiler.server.merging import merge
from nanoflow_compiler.server.metrics import Metrics
from nanoflow_compiler.server.protocol import GenerationRequest
from nanoflow_compiler.server.request_watch import RequestWatch
from nanoflow_compiler.server.settings import ServerSettings
from nanoflow_compiler.server.text import TextCodec
from nanoflow_compiler.server.tool_calls import ToolParser

__all__ = ["Job", "ServerContext", "context_of"]

REFUSALS = (RequestError, OutOfBlocksError, ConfigError)
"""The engine did not take the request: that is no end of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Prompts that one HTTP request sent, and how to continue them."""

    request_id: str
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    arrival: float = field(default_factory=time.monotonic)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def indices(self) -> range:
        """Of the choices of the answer: ``n`` of each prompt, prompt by prompt."""
        return range(len(self.prompts) * self.params.n)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerContext:
    """Lives as long as the app."""

    engine: EngineClient
    settings: ServerSettings
    codec: TextCodec
    admission: Admission
    metrics: Metrics
    tool_parser: ToolParser | None
    chat_template: str | None
    """In place of the tokenizer's."""
    sampling_defaults: Mapping[str, float]
    """Of fields that a request leaves out."""
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def model_names(self) -> tuple[str, ...]:
        return self.settings.served_model_names or (self.engine.model_name,)

    def check_model(self, name: str) -> str:
        """The name to answer with; 404 for a model that is not here."""
        if name and name not in self.model_names:
            raise ApiError(
                f"the model {name!r} is not served here; there is {', '.join(self.model_names)}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return name or self.model_names[0]

    def interval(self, body: GenerationRequest) -> int:
        """Tokens in a chunk of a stream: a request may ask for more than the server's, not for less."""
        return max(self.settings.stream_interval, body.stream_interval)

    async def outputs(self, job: Job) -> AsyncGenerator[tuple[int, Output], None]:
        """Outputs with the index of their prompt; closing it aborts what still runs."""
        names = [f"{job.request_id}-{i}" for i in range(len(job.prompts))]
        with (
            self.admission.open(names, num_each=job.params.n) as ids,
            self.admission.queued_tokens([len(prompt) for prompt in job.prompts]) as begin,
            self._watching(job, ids) as watches,
        ):
            streams = [
                self.engine.generate(
                    {"prompt_token_ids": tokens}, job.params, request_id=request_id
                )
                for tokens, request_id in zip(job.prompts, ids, strict=True)
            ]
            async with aclosing(merge(streams)) as merged:
                async for index, output in merged:
                    begin(index)
                    watches[index].see(output)
                    _check_ends(output)
                    yield index, output

    async def last_outputs(self, job: Job) -> list[Output]:
        """The final output of each prompt."""
        async with aclosing(self.outputs(job)) as outputs:
            last = {index: output async for index, output in outputs}
        return [last[index] for index in range(len(job.prompts))]

    @contextmanager
    def _watching(self, job: Job, ids: Sequence[str]) -> Iterator[list[RequestWatch]]:
        """One watch for each prompt; what did not end by itself ends with the job."""
        watches = [
            RequestWatch(
                self.metrics,
                name,
                arrival=job.arrival,
                num_prompt_tokens=len(prompt),
                params=job.params,
                log_level=logging.INFO if self.settings.enable_log_requests else logging.DEBUG,
            )
            for name, prompt in zip(ids, job.prompts, strict=True)
        ]
        reason = "abort"
        try:
            yield watches
        except Exception as error:
            reason = "refused" if isinstance(error, REFUSALS) else "error"
            raise
        finally:
            for watch in watches:
                watch.close(reason)


def _check_ends(output: Output) -> None:
    """An engine may tell of a failed request by its end alone; to a client that is an error."""
    if any(one.finish_reason == "error" for one in output.outputs):
        raise ApiError(
            "the engine failed on this request; its log says why", status=500, code="engine_error"
        )


def context_of(request: Request) -> ServerContext:
    """What ``create_app`` attached to the app."""
    return cast("ServerContext", request.app.state.context)
