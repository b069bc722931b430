"""The ``nanoflow`` command: answers go to standard output, everything else to standard error."""

import typer

from nanoflow_compiler.cli import bench, chat, check, generate, serve
from nanoflow_compiler.cli.vllm_flags import ServeCommand

# torch, transformers and the engine are imported by the commands that use them: --help stays fast.

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A graph compiler that overlaps compute, memory and network for LLM serving.",
)
app.command()(generate.generate)
app.command()(check.check)
app.command(cls=ServeCommand)(serve.serve)
app.command()(chat.chat)
app.add_typer(bench.bench, name="bench")


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="nanoflow")
