"""``nanoflow chat``: a conversation in the terminal, with a server or with a model in this process."""

import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from nanoflow_compiler.bench.model import ModelSettings
from nanoflow_compiler.cli.chat_server import ServerChat
from nanoflow_compiler.cli.chat_session import AnswerFn, Session, typed_lines
from nanoflow_compiler.cli.command import command
from nanoflow_compiler.cli.options import CompileFlags, Device, Dtype, EngineFlags, given
from nanoflow_compiler.cli.spec import make_spec
from nanoflow_compiler.errors import ConfigError

__all__ = ["chat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOfChat:
    """Where the answers come from, unless a model is loaded here; names are vLLM's."""

    url: Annotated[str, typer.Option(help="Of a running server.")] = "http://127.0.0.1:8000/v1"
    model_name: Annotated[
        str | None,
        typer.Option("--model", "--model-name", help="What the server calls it; its first."),
    ] = None
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="If the server wants one.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSampling:
    """What is not given is left to the server, or to the engine."""

    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.")] = None
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None
    top_k: Annotated[int | None, typer.Option(help="Sample from so many tokens.")] = None
    top_p: Annotated[float | None, typer.Option(help="Sample from this much probability.")] = None
    seed: Annotated[int | None, typer.Option(help="Makes answers repeatable.")] = None


@command
def chat(
    model: Annotated[
        str | None, typer.Argument(help="Load this model here, instead of asking a server.")
    ] = None,
    *,
    server: ServerOfChat,
    system_prompt: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    quick: Annotated[
        str | None, typer.Option("--quick", "-q", help="Ask this, print the answer, and end.")
    ] = None,
    sampling: ChatSampling,
    dtype: Dtype = "auto",
    device: Device = "auto",
    engine: EngineFlags,
    compiler: CompileFlags,
) -> None:
    """Talk to a model: of a server, or with MODEL in this process, for which the last flags are."""
    settings = given(**asdict(sampling))
    if model is None:
        changed = (dtype, device, compiler) != ("auto", "auto", CompileFlags())
        _refuse(engine.settings() or changed, "a MODEL")
        remote = ServerChat(
            server.url, model=server.model_name, api_key=server.api_key, sampling=settings
        )
        _talk(remote.answer, system_prompt=system_prompt, quick=quick)
        return
    _refuse(server.model_name or server.url != ServerOfChat().url, "a server, without MODEL")
    named = ModelSettings(model=model, dtype=dtype, device=device)
    spec = make_spec(named, engine=engine, compiler=compiler)
    from nanoflow_compiler.cli.chat_local import LocalChat

    with closing(LocalChat(spec, sampling=settings)) as local:
        _talk(local.answer, system_prompt=system_prompt, quick=quick)


def _refuse(is_given: object, owner: str) -> None:
    if is_given:
        raise ConfigError(f"some of these flags are for {owner}; see nanoflow chat --help")


def _talk(answer: AnswerFn, *, system_prompt: str | None, quick: str | None) -> None:
    session = Session(answer, system_prompt=system_prompt)
    if quick is None:
        session.run(typed_lines(sys.stdin))
    else:
        session.ask(quick)
