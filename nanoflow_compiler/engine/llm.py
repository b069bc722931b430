"""``LLM``: a model and an engine in this process, shaped as vLLM's class of that name."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.engine.build import build_engine
from nanoflow_compiler.engine.core import EngineCore
from nanoflow_compiler.engine.device_times import DeviceTimes
from nanoflow_compiler.engine.engine_config import EngineConfig
from nanoflow_compiler.engine.limits import RequestLimits
from nanoflow_compiler.engine.memory import explain_out_of_memory
from nanoflow_compiler.engine.output_processor import Answer, OutputProcessor
from nanoflow_compiler.engine.outputs import RequestOutput
from nanoflow_compiler.engine.prompt import Prompt
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.engine.served import Loading
from nanoflow_compiler.errors import ConfigError, EngineClosedError, RequestError
from nanoflow_compiler.models import Decoder
from nanoflow_compiler.models.weights import DummyDistribution

__all__ = ["LLM"]

_MOST_ADDED = 256
"""Prompts between two steps: more than one step begins unless they are tiny, and soon done beside one."""


class LLM:
    """Generates text for batches of prompts; close it, or use it as a context manager."""

    def __init__(  # noqa: PLR0913 - each is a setting of its own, named as vLLM names it
        self,
        model: str | Path | Decoder | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        tensor_parallel_size: int = 1,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        num_kv_blocks: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        gpu_memory_utilization: float | None = None,
        enable_prefix_caching: bool = True,
        seed: int = 0,
        load_format: Literal["auto", "dummy"] = "auto",
        dummy_distribution: DummyDistribution = "normal",
        hf_overrides: Mapping[str, Any] | None = None,
        enforce_eager: bool = False,
        options: Mapping[str, object] | None = None,
    ) -> None:
        """``options`` are those of ``torch.compile(..., backend="nanoflow", options=...)``."""
        if tensor_parallel_size != 1:
            raise ConfigError(
                f"tensor_parallel_size={tensor_parallel_size}: this engine runs on one device"
            )
        compile_config = CompileConfig.from_options(options)
        config = EngineConfig(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_kv_blocks=num_kv_blocks,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            enable_prefix_caching=enable_prefix_caching,
            seed=seed,
        )
        built = build_engine(
            model,
            tokenizer=tokenizer,
            loading=Loading(
                dtype=dtype,
                load_format=load_format,
                device=str(device),
                dummy_distribution=dummy_distribution,
                hf_overrides=hf_overrides,
            ),
            config=config,
            compile_config=None if enforce_eager else compile_config,
        )
        self.tokenizer = built.tokenizer
        self.facts = built.facts
        """What is in force: device, dtype, sizes, and bytes of the memory by use."""
        self.seconds = built.seconds
        """By stage of the start."""
        self._path = built.path
        self._processor = OutputProcessor(built.tokenizer)
        self._core: EngineCore | None = built.core

    @property
    def model_path(self) -> Path | None:
        """The local directory of the model; ``None`` where it was given as a module."""
        return self._path

    @property
    def device_times(self) -> DeviceTimes | None:
        """What a GPU says of its steps."""
        return self._open_core().runner.times

    @property
    def limits(self) -> RequestLimits:
        """What one request may ask for."""
        return self._open_core().limits

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_finished: Callable[[int], None] = lambda _: None,
    ) -> list[RequestOutput]:
        """One output per prompt, in the order of the prompts.

        All prompts are checked before any of them runs. ``on_finished`` is told how many prompts each
        step finished.
        """
        core = self._open_core()
        listed: list[Prompt] = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        params = _one_per_prompt(sampling_params, num_prompts=len(listed))
        answers = [
            self._answer(prompt, one, request_id=str(index))
            for index, (prompt, one) in enumerate(zip(listed, params, strict=True))
        ]
        for answer in answers:
            for request in answer.requests:
                core.limits.check(request)
        outputs = self._run(core, answers, on_finished)
        return [outputs[answer.request_id] for answer in answers]

    def _answer(self, prompt: Prompt, params: SamplingParams, *, request_id: str) -> Answer:
        return self._processor.answer(
            self._token_ids(prompt),
            params,
            request_id=request_id,
            prompt=prompt if isinstance(prompt, str) else None,
        )

    def _run(
        self, core: EngineCore, answers: Sequence[Answer], on_finished: Callable[[int], None]
    ) -> dict[str, RequestOutput]:
        """Outputs by id, when all are finished; whatever stops the loop, none is left in the engine.

        Prompts are added, and outputs are made, while steps run.
        """
        outputs: dict[str, RequestOutput] = {}
        left = iter(answers)
        try:
            with explain_out_of_memory("in a step"):
                while (added := list(islice(left, _MOST_ADDED))) or core.has_requests:
                    self._add(core, added)
                    if (output := core.step()) is not None:
                        grown, stopped = self._processor.process(output)
                        core.abort(stopped)
                        finished = [answer for answer in grown if answer.finished]
                        outputs |= {answer.request_id: answer.output() for answer in finished}
                        on_finished(len(finished))
        finally:
            keys = [key for answer in answers for key in self._processor.close(answer)]
            if keys:
                core.abort(keys)
        return outputs

    def _add(self, core: EngineCore, answers: Sequence[Answer]) -> None:
        for answer in answers:
            self._processor.open(answer)
            for request in answer.requests:
                core.add(request)

    def close(self) -> None:
        """Give back the KV cache and the programs; a closed engine accepts no more prompts."""
        if self._core is not None:
            self._core.close()
            self._core = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open_core(self) -> EngineCore:
        if self._core is None:
            raise EngineClosedError("this LLM is closed; make a new one")
        return self._core

    def _token_ids(self, prompt: Prompt) -> Sequence[int]:
        if isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
            return prompt["prompt_token_ids"]
        if not isinstance(prompt, str):
            raise RequestError(
                "a prompt is text or {'prompt_token_ids': [...]}, not " + type(prompt).__name__
            )
        if self.tokenizer is None:
            raise ConfigError(
                "the model has no tokenizer: pass one, or prompts as {'prompt_token_ids': [...]}"
            )
        ids: list[int] = self.tokenizer(prompt)["input_ids"]
        return ids


def _one_per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, *, num_prompts: int
) -> Sequence[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if len(params) != num_prompts:
        raise ConfigError(
            f"{len(params)} sampling_params for {num_prompts} prompts: give one, or one for each"
        )
    return params
