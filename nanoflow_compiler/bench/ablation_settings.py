"""Settings of ``nanoflow bench ablation``."""

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from nanoflow_compiler.bench.model import Device
from nanoflow_compiler.errors import ConfigError

__all__ = ["AblationSettings", "Order"]

Order = Literal["decodes-first", "mixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AblationSettings:
    """What a step computes, and the plans that are compared."""

    decodes: Annotated[int, typer.Option(min=0, help="Requests that decode.")] = 1024
    context: Annotated[int, typer.Option(min=1, help="Tokens that each of them sees.")] = 768
    prompt_tokens: Annotated[int, typer.Option(min=0, help="Tokens of prompts in the step.")] = 1024
    prompt_len: Annotated[int, typer.Option(min=2, help="Tokens of each prompt.")] = 512
    parts: Annotated[int, typer.Option(min=2, help="Nano-batches of a plan in parts.")] = 2
    order: Annotated[
        Literal["decodes-first", "mixed", "both"],
        typer.Option(help="decodes-first: a part is of one kind; mixed: parts are alike."),
    ] = "both"
    memory_sms: Annotated[
        str, typer.Option(help="SMs of attention beside GEMMs, one or more: 24,40.")
    ] = "24,32,40,48"
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each measurement.")] = 1.5
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"
    device: Device = "auto"
    seed: Annotated[int, typer.Option(help="Of tokens, and of where their cache is.")] = 0

    def check(self) -> None:
        """ConfigError for a step of nothing, and for what is no number of SMs."""
        if self.decodes + self.prompt_tokens < self.parts:
            raise ConfigError("a step needs a token for each part; raise --decodes")
        if 0 < self.prompt_tokens < 2:
            raise ConfigError("--prompt-tokens must be 0, or 2 and more: one token is a decode")
        if not self.sms:
            raise ConfigError(
                f"--memory-sms must be numbers such as 24,40, not {self.memory_sms!r}"
            )

    @property
    def sms(self) -> tuple[int, ...]:
        """Of ``memory_sms``; empty where it has anything else."""
        words = [word.strip() for word in self.memory_sms.split(",")]
        return tuple(map(int, words)) if all(word.isdecimal() for word in words) else ()

    @property
    def orders(self) -> tuple[Order, ...]:
        """Those that are compared."""
        if self.order != "both":
            return (self.order,)
        has_both = self.decodes and self.prompt_tokens
        return ("decodes-first", "mixed") if has_both else ("decodes-first",)

    @property
    def prompt_lens(self) -> list[int]:
        """Of all prompts; the last may be shorter."""
        count, rest = divmod(self.prompt_tokens, self.prompt_len)
        lens = [self.prompt_len] * count
        if rest == 1 and lens:
            lens[-1] += 1
        elif rest:
            lens.append(rest)
        return lens

    @property
    def num_tokens(self) -> int:
        """Of the step."""
        return self.decodes + self.prompt_tokens

    @property
    def mean_context(self) -> int:
        """Tokens that a token of the step attends to."""
        of_prompts = sum(length * (length + 1) // 2 for length in self.prompt_lens)
        return max(1, (self.decodes * self.context + of_prompts) // self.num_tokens)
