"""``nanoflow generate``: answers to prompts, in the process of the command."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from nanoflow_compiler.cli.command import command
from nanoflow_compiler.cli.options import (
    CompileFlags,
    Device,
    Dtype,
    EngineFlags,
    Model,
    SamplingFlags,
    given,
)
from nanoflow_compiler.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nanoflow_compiler.engine.outputs import RequestOutput
    from nanoflow_compiler.engine.prompt import Prompt

__all__ = ["generate"]


@command
def generate(
    model: Model,
    *,
    prompt: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(allow_dash=True, help="One prompt a line; - is standard input.")
    ] = None,
    sampling: SamplingFlags,
    dtype: Dtype = "auto",
    device: Device = "auto",
    engine: EngineFlags,
    compiler: CompileFlags,
    dump: Annotated[Path | None, typer.Option(help="Write every compile step here.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw", help="Apply the chat template; by default if the model has one."
        ),
    ] = None,
) -> None:
    """Answer prompts."""
    settings = {
        "dtype": dtype,
        "device": device,
        **engine.settings(),
        "enforce_eager": compiler.enforce_eager,
        "options": compiler.options() | given(dump=dump),
    }
    _generate(model, _read_prompts(prompt, prompt_file), asdict(sampling), settings, chat=chat)


def _generate(
    model: str,
    prompts: list[str],
    sampling: dict[str, Any],
    engine: dict[str, Any],
    *,
    chat: bool | None,
) -> None:
    seconds: dict[str, float] = {}
    with _timed(seconds, "import"):
        from nanoflow_compiler import LLM, SamplingParams
    params = SamplingParams(**sampling)
    with _timed(seconds, "load"):
        llm = LLM(model, **engine)
    with closing(llm):
        requests = _apply_template(llm.tokenizer, prompts, model=model, chat=chat)
        with _timed(seconds, "generate"):
            outputs = llm.generate(requests, params)
    _print_answers(prompts, outputs)
    _print_speed(outputs, seconds)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def _read_prompts(texts: list[str] | None, file: Path | None) -> list[str]:
    prompts = list(texts or [])
    if file is not None:
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompt-file {file} cannot be read: {error}") from error
        prompts += [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError("no prompt; pass --prompt TEXT or --prompt-file FILE")
    return prompts


def _apply_template(
    tokenizer: "PreTrainedTokenizerBase | None",
    prompts: list[str],
    *,
    model: str,
    chat: bool | None,
) -> "Sequence[Prompt]":
    """Token ids for a chat: the template's text holds special tokens that must not be added twice."""
    template = getattr(tokenizer, "chat_template", None)
    if tokenizer is None or template is None:
        if chat:
            raise ConfigError(f"{model} has no chat template; use --raw")
        return prompts
    if chat is False:
        return prompts
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    ids = tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, return_dict=False
    )
    return [{"prompt_token_ids": one} for one in cast("list[list[int]]", ids)]


def _print_answers(prompts: list[str], outputs: "list[RequestOutput]") -> None:
    for prompt, output in zip(prompts, outputs, strict=True):
        if len(prompts) > 1:
            typer.echo(f"> {prompt}")
        typer.echo(output.outputs[0].text)


def _print_speed(outputs: "list[RequestOutput]", seconds: dict[str, float]) -> None:
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    rate = num_tokens / seconds["generate"]
    stages = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in seconds.items())
    typer.echo(f"[{num_tokens} tokens, {rate:.1f} tokens/s; {stages}]", err=True)
