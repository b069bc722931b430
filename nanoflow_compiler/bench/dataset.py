"""The requests of a benchmark: prompts, lengths of answers, and when they arrive."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import numpy.typing as npt
import typer

from nanoflow_compiler.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BenchRequest", "DatasetName", "DatasetSettings", "Vocabulary"]

DatasetName = Literal["random", "sharegpt", "trace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """One prompt, and how much is wanted of it."""

    prompt_token_ids: list[int]
    text: str | None = None
    """The same prompt, where it is text."""
    output_len: int
    arrival_s: float | None = None
    """After the first request, where the dataset knows."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens that random prompts consist of."""

    token_ids: npt.NDArray[np.int64]

    @classmethod
    def of(cls, size: int, tokenizer: "PreTrainedTokenizerBase | None" = None) -> "Vocabulary":
        """All that are not special, as far as a tokenizer knows."""
        special = list(tokenizer.all_special_ids) if tokenizer is not None else []
        return cls(np.setdiff1d(np.arange(size), special))

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """So many tokens, each as likely as any other."""
        tokens: list[int] = rng.choice(self.token_ids, size=count).tolist()
        return tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSettings:
    """Which requests; names are vLLM's."""

    dataset_name: Annotated[
        DatasetName | None, typer.Option(help="random; trace if there is a --trace.")
    ] = None
    dataset_path: Annotated[
        Path | None, typer.Option(help="The JSON file of sharegpt, or the trace.")
    ] = None
    trace: Annotated[
        Path | None, typer.Option(help="CSV of TIMESTAMP,ContextTokens,GeneratedTokens.")
    ] = None
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests.")] = 1000
    input_len: Annotated[int | None, typer.Option(min=1, help="As --random-input-len.")] = None
    output_len: Annotated[
        int | None, typer.Option(min=1, help="As --random-output-len; also of sharegpt.")
    ] = None
    random_input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 1024
    random_output_len: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 128
    random_range_ratio: Annotated[
        float, typer.Option(help="Lengths differ by up to this fraction, below 1.")
    ] = 0.0
    random_prefix_len: Annotated[
        int, typer.Option(min=0, help="Tokens that all prompts begin with, in addition.")
    ] = 0
    sharegpt_output_len: Annotated[
        int | None, typer.Option(min=1, help="Instead of the length of the answer in the file.")
    ] = None
    seed: Annotated[int, typer.Option(help="The same seed draws the same requests.")] = 0

    @property
    def name(self) -> DatasetName:
        """What was asked for, or what a trace implies."""
        return self.dataset_name or ("trace" if self.trace else "random")

    @property
    def path(self) -> Path:
        """The file of a dataset that has one."""
        path = self.trace or self.dataset_path
        if path is None:
            raise ConfigError(f"--dataset-name {self.name} needs a file: pass --dataset-path")
        return path

    def check(self) -> None:
        """Refuse what would silently have no effect."""
        if self.name == "random" and self.dataset_path:
            raise ConfigError("--dataset-path is for --dataset-name sharegpt or trace")
        if self.trace and (self.name != "trace" or self.dataset_path):
            raise ConfigError("--trace FILE stands for --dataset-name trace --dataset-path FILE")
        if not 0 <= self.random_range_ratio < 1:
            raise ConfigError("--random-range-ratio must be at least 0 and below 1")
        if self.name != "random" and not self.path.is_file():
            raise ConfigError(f"{self.path} is not a file; check the path")
