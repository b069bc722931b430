"""The ``nanoflow`` command: answers go to standard output, everything else to standard error."""

import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from nanoflow_compiler.config import cache_dir
from nanoflow_compiler.errors import ConfigError, NanoflowError

# torch, transformers and the engine are imported by the commands that use them: --help stays fast.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nanoflow_compiler.engine.outputs import RequestOutput
    from nanoflow_compiler.engine.prompt import Prompt

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A graph compiler that overlaps compute, memory and network for LLM serving.",
)

OPTIONAL_PACKAGES = {
    "gguf": "GGUF files, and the alias smollm2-135m",
    "accelerate": "GGUF files, and loading straight onto a GPU",
}
CXX_COMPILERS = ("g++", "clang++", "c++")

Verbose = Annotated[bool, typer.Option("--verbose", help="Log progress; show tracebacks.")]
Model = Annotated[
    str, typer.Argument(help="Directory, .gguf file, hub id, or an alias such as smollm2-135m.")
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(allow_dash=True, help="One prompt a line; - is standard input.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of each answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from so many tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from this much probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    dtype: Dtype = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Prompt and answer, tokens.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Prompts at the same time.")] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens of one step; longer prompts take several.")
    ] = None,
    enforce_eager: Annotated[
        bool, typer.Option("--enforce-eager", help="Do not compile; for comparison.")
    ] = False,
    parts: Annotated[str, typer.Option(help="Nano-batches of each operation, or auto.")] = "auto",
    backend: Annotated[str | None, typer.Option(help="codegen or reference.")] = None,
    dump: Annotated[Path | None, typer.Option(help="Write every compile step here.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw", help="Apply the chat template; by default if the model has one."
        ),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Answer prompts."""
    sampling = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    options = _given(parts=_parse_parts(parts), backend=backend, dump=dump)
    engine = _given(
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enforce_eager=enforce_eager,
        options=options,
    )
    with _errors_as_one_line(verbose=verbose):
        _generate(model, _read_prompts(prompt, prompt_file), sampling, engine, chat=chat)


@app.command()
def check(
    model: Annotated[str | None, typer.Argument(help="Also show how this model compiles.")] = None,
    dtype: Dtype = "auto",
    load_format: Annotated[str, typer.Option(help="auto, or dummy: random weights.")] = "auto",
    num_hidden_layers: Annotated[
        int | None, typer.Option(help="Fewer layers; with --load-format dummy.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Show what this machine can do, or how a model compiles."""
    with _errors_as_one_line(verbose=verbose):
        if model is None:
            _print_machine()
        else:
            loading = {"load_format": load_format, "num_hidden_layers": num_hidden_layers}
            _print_report(model, dtype=dtype, **loading)


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address; 0.0.0.0 is all of this machine's.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(help="Clients must send one of these; may be repeated.")
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Names that requests may use; may be repeated.")
    ] = None,
    dtype: Dtype = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Prompt and answer, tokens.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Requests at the same time.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Tokens of one step.")] = None,
    num_kv_blocks: Annotated[int | None, typer.Option(help="KV blocks of 64 tokens.")] = None,
    kv_cache_memory_bytes: Annotated[int | None, typer.Option(help="Bytes of KV cache.")] = None,
    enable_prefix_caching: Annotated[
        bool, typer.Option(help="Keep blocks for prompts that begin alike.")
    ] = True,
    seed: Annotated[int, typer.Option(help="For requests without one.")] = 0,
    max_open_requests: Annotated[
        int | None, typer.Option(help="More are answered with 503.")
    ] = None,
    request_timeout_s: Annotated[float | None, typer.Option(help="Of a whole request.")] = None,
    shutdown_timeout_s: Annotated[
        float | None, typer.Option(help="After SIGTERM, until requests are aborted.")
    ] = None,
    allowed_origin: Annotated[list[str] | None, typer.Option(help="CORS; may be repeated.")] = None,
    root_path: Annotated[str | None, typer.Option(help="Where a proxy shows the server.")] = None,
    tool_call_parser: Annotated[
        str | None, typer.Option(help="auto, hermes, llama3_json or none.")
    ] = None,
    disable_docs: Annotated[bool, typer.Option("--disable-docs", help="No /openapi.json.")] = False,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="Do not compile.")] = False,
    parts: Annotated[str, typer.Option(help="Nano-batches of each operation, or auto.")] = "auto",
    backend: Annotated[str | None, typer.Option(help="codegen or reference.")] = None,
    verbose: Verbose = False,
) -> None:
    """Answer over HTTP, as OpenAI's API does."""
    server = _given(
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        served_model_names=tuple(served_model_name or ()),
        allowed_origins=tuple(allowed_origin or ()),
        max_open_requests=max_open_requests,
        request_timeout_s=request_timeout_s,
        shutdown_timeout_s=shutdown_timeout_s,
        root_path=root_path,
        tool_call_parser=tool_call_parser,
        disable_docs=disable_docs,
    )
    engine = _given(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        num_kv_blocks=num_kv_blocks,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        enable_prefix_caching=enable_prefix_caching,
        seed=seed,
    )
    options = _given(parts=_parse_parts(parts), backend=backend)
    with _errors_as_one_line(verbose=verbose):
        _serve(model, dtype, engine, options, server, enforce_eager=enforce_eager)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="nanoflow")


@contextmanager
def _errors_as_one_line(*, verbose: bool) -> Iterator[None]:
    """Our own errors tell a user what to do: their traceback would only hide it."""
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        yield
    except NanoflowError as error:
        if verbose:
            traceback.print_exc()
        typer.echo(f"nanoflow: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error


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


def _serve(
    model: str,
    dtype: str,
    engine: dict[str, Any],
    options: dict[str, Any],
    server: dict[str, Any],
    *,
    enforce_eager: bool,
) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        from nanoflow_compiler.serve import ServeConfig, serve_model
        from nanoflow_compiler.server.settings import ServerSettings
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is missing; install it with: pip install 'nanoflow-compiler[server]'"
        ) from error
    serve_model(
        ServeConfig(
            model=model,
            dtype=dtype,
            enforce_eager=enforce_eager,
            engine=engine,
            options=options,
            server=ServerSettings(**server),
        )
    )


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def _read_prompts(given: list[str] | None, file: Path | None) -> list[str]:
    prompts = list(given or [])
    if file is not None:
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompt-file {file} cannot be read: {error}") from error
        prompts += [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError("no prompt; pass --prompt TEXT or --prompt-file FILE")
    return prompts


def _given(**settings: object) -> dict[str, Any]:
    """What the user set: the rest keeps the defaults of the engine and the compiler."""
    return {name: value for name, value in settings.items() if value is not None}


def _parse_parts(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


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


def _print_report(model: str, **loading: Any) -> None:
    from nanoflow_compiler.inspection import inspect
    from nanoflow_compiler.models import load_decoder

    typer.echo(inspect(load_decoder(model, **loading)))


def _print_machine() -> None:
    table = Table(show_header=False, box=None)
    for name, value in _machine_facts():
        table.add_row(name, value)
    Console().print(table)


def _machine_facts() -> Iterator[tuple[str, str]]:
    import torch

    yield "python", sys.version.split()[0]
    for package in ("nanoflow-compiler", "torch", "transformers"):
        yield package, _version(package) or "absent"
    for package, use in OPTIONAL_PACKAGES.items():
        yield package, _version(package) or f"absent ({use})"
    compiler = next(filter(None, map(shutil.which, CXX_COMPILERS)), None)
    yield "C++ compiler", compiler or "absent (Inductor needs one on the CPU; install g++)"
    yield "CPU cores", str(len(os.sched_getaffinity(0)))
    yield "GPUs", ", ".join(_gpu_names(torch.cuda)) or "none"
    yield "cache", str(cache_dir())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu_names(cuda: Any) -> Iterator[str]:
    for index in range(cuda.device_count()):
        properties = cuda.get_device_properties(index)
        yield f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)"
