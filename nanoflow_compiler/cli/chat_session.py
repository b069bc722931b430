"""A conversation in a terminal."""

import re
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import TextIO

import typer

from nanoflow_compiler.errors import NanoflowError

__all__ = ["AnswerFn", "Message", "Session", "typed_lines"]

Message = dict[str, str]
"""``role`` and ``content``."""
AnswerFn = Callable[[list[Message]], Generator[str, None, None]]
"""The pieces of an answer to a conversation, as they come; closing it stops the answer."""

COMMAND = re.compile(r"/\w+")
HELP = "/clear forgets the conversation, /exit ends; Ctrl-C stops an answer, Ctrl-D ends"


class Session:
    """Keeps what was said, so that the model can refer to it."""

    def __init__(self, answer: AnswerFn, *, system_prompt: str | None) -> None:
        self._answer = answer
        self._begin: list[Message] = []
        if system_prompt:
            self._begin = [{"role": "system", "content": system_prompt}]
        self.messages = list(self._begin)

    def ask(self, text: str) -> None:
        """Print the answer as it comes; what was said until Ctrl-C is kept, a failure leaves no trace."""
        question = {"role": "user", "content": text}
        said = []
        try:
            with closing(self._answer([*self.messages, question])) as pieces:
                for piece in pieces:
                    typer.echo(piece, nl=False)
                    said.append(piece)
        except KeyboardInterrupt:
            typer.echo(" [stopped]", err=True, nl=False)
        typer.echo()
        self.messages += [question, {"role": "assistant", "content": "".join(said)}]

    def run(self, lines: Iterable[str]) -> None:
        """Answer every line, until /exit or the end of them."""
        for line in lines:
            text = line.strip()
            if text == "/exit":
                return
            if text == "/clear":
                self.messages = list(self._begin)
            elif COMMAND.fullmatch(text):
                typer.echo(HELP, err=True)
            elif text:
                self._try(text)

    def _try(self, text: str) -> None:
        """One question that fails does not end the conversation, nor does more than one Ctrl-C."""
        try:
            self.ask(text)
        except NanoflowError as error:
            typer.echo(f"nanoflow: {' '.join(str(error).split())}", err=True)
        except KeyboardInterrupt:
            typer.echo(err=True)


def typed_lines(source: TextIO) -> Iterator[str]:
    """What a person types, or what another program writes."""
    if not source.isatty():
        yield from source
        return
    import readline  # noqa: F401 - input() then has a history, and lines can be edited

    typer.echo(HELP, err=True)
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            typer.echo("\n" + HELP, err=True)
        except EOFError:
            typer.echo(err=True)
            return
