"""``LLM`` under load."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from nanoflow_compiler import LLM, SamplingParams
from nanoflow_compiler.bench.dataset import BenchRequest, Vocabulary
from nanoflow_compiler.bench.model import ModelSettings
from nanoflow_compiler.engine.device_times import StepTimes

__all__ = ["LlmBackend"]


class LlmBackend:
    """Answers of full length, by default drawn at temperature 1 as vLLM's benchmark does."""

    def __init__(
        self, model: ModelSettings, engine: dict[str, Any], *, temperature: float = 1.0
    ) -> None:
        """``engine`` are further arguments of :class:`LLM`."""
        self.temperature = temperature
        self.llm = LLM(model.name, **model.loading(), **engine)
        self.facts, self.seconds = self.llm.facts, self.llm.seconds
        self.device = torch.device(self.facts["device"])
        self.tokenizer = self.llm.tokenizer
        self.max_model_len = self.llm.limits.max_model_len
        self.vocabulary = Vocabulary.of(self.llm.limits.vocab_size, self.tokenizer)

    def run(self, requests: Sequence[BenchRequest], on_finished: Callable[[int], None]) -> int:
        """Answer all; the number of new tokens."""
        outputs = self.llm.generate(
            [{"prompt_token_ids": request.prompt_token_ids} for request in requests],
            [
                SamplingParams(
                    temperature=self.temperature, ignore_eos=True, max_tokens=request.output_len
                )
                for request in requests
            ],
            on_finished=on_finished,
        )
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def take_step_times(self) -> StepTimes | None:
        """Of a GPU, since the last call."""
        times = self.llm.device_times
        return None if times is None else times.take()

    def close(self) -> None:
        """Give back what the engine holds."""
        self.llm.close()
