"""Answers of a model in this process."""

import itertools
from collections.abc import Generator, Mapping
from typing import Any, cast

from nanoflow_compiler.cli.chat_session import Message
from nanoflow_compiler.engine.output_processor import OutputProcessor
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.engine.spec import EngineSpec
from nanoflow_compiler.errors import ConfigError

__all__ = ["LocalChat"]


class LocalChat:
    """Loads the model on construction; what was computed of a conversation stays in the prefix cache."""

    def __init__(self, spec: EngineSpec, *, sampling: Mapping[str, Any]) -> None:
        """``sampling`` are fields of :class:`SamplingParams`; without ``max_tokens``, all that fits."""
        self._params = SamplingParams(**{"max_tokens": None, **sampling})
        built = spec.build()
        self._core = built.core
        self._tokenizer = built.tokenizer
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise ConfigError(f"{spec.model} has no chat template; use nanoflow generate --raw")
        self._processor = OutputProcessor(self._tokenizer)
        self._numbers = itertools.count(1)

    def answer(self, messages: list[Message]) -> Generator[str, None, None]:
        """The pieces of text as they are found; leaving early stops the engine."""
        answer = self._processor.answer(
            self._tokens(messages), self._params, request_id=str(next(self._numbers))
        )
        self._processor.open(answer)
        num_shown = 0
        try:
            for request in answer.requests:
                self._core.add(request)
            while not answer.finished:
                self._step()
                text = answer.output().outputs[0].text
                yield text[num_shown:]
                num_shown = len(text)
        finally:
            self._core.abort(self._processor.close(answer))
            while self._core.has_requests:
                self._core.step()

    def close(self) -> None:
        """Give back what the engine holds."""
        self._core.close()

    def _step(self) -> None:
        if (output := self._core.step()) is not None:
            _, stopped = self._processor.process(output)
            self._core.abort(stopped)

    def _tokens(self, messages: list[Message]) -> list[int]:
        assert self._tokenizer is not None
        ids = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        return cast("list[int]", ids)
