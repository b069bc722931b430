"""The baseline: ``model.generate`` of transformers on padded batches."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nanoflow_compiler.bench.dataset import BenchRequest, Vocabulary
from nanoflow_compiler.bench.model import ModelSettings
from nanoflow_compiler.models import load_decoder

__all__ = ["HfBackend"]


class HfBackend:
    """Batches in order of arrival, each as long as its longest prompt and its longest answer."""

    def __init__(
        self, model: ModelSettings, *, max_batch_size: int, temperature: float = 1.0
    ) -> None:
        start = time.perf_counter()
        decoder = load_decoder(model.name, **model.loading())
        self.seconds = {"load": time.perf_counter() - start}
        self.facts: dict[str, Any] = {}
        self.model: Any = decoder.model
        self.device: torch.device = decoder.model.device
        self.temperature = temperature
        self.max_batch_size = max_batch_size
        self.tokenizer = decoder.tokenizer
        self.max_model_len = decoder.max_model_len
        size = decoder.config.get_text_config().vocab_size
        self.vocabulary = Vocabulary.of(size, self.tokenizer)

    def run(self, requests: Sequence[BenchRequest], on_finished: Callable[[int], None]) -> int:
        """Answer all; the number of new tokens that were asked for, without what only fills up."""
        for start in range(0, len(requests), self.max_batch_size):
            batch = requests[start : start + self.max_batch_size]
            self._generate(batch)
            on_finished(len(batch))
        return sum(request.output_len for request in requests)

    def _generate(self, batch: Sequence[BenchRequest]) -> None:
        prompts = [request.prompt_token_ids for request in batch]
        most = max(request.output_len for request in batch)
        longest = max(map(len, prompts))
        ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        self.model.generate(
            torch.tensor(ids, device=self.device),
            attention_mask=torch.tensor(mask, device=self.device),
            **self._sampling(),
            min_new_tokens=most,
            max_new_tokens=most,
            pad_token_id=0,
        )

    def _sampling(self) -> dict[str, Any]:
        if not self.temperature:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature}

    def take_step_times(self) -> None:
        """It does not measure them."""

    def close(self) -> None:
        """Let the model go."""
        del self.model
