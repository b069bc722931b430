"""One start of ``nanoflow serve``, as a user sees it: from its process to a first token over HTTP."""

import asyncio
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanoflow_compiler.bench.dataset import BenchRequest
from nanoflow_compiler.bench.http import HttpClient, HttpError
from nanoflow_compiler.bench.openai_client import Answer, OpenAIClient
from nanoflow_compiler.errors import NanoflowError

__all__ = ["serve_flags", "start_server"]

MAIN = "from nanoflow_compiler.cli import main; main()"
NAME = "startup"
POLL_S = 0.02
SHUTDOWN_S = 60.0
STAGE = re.compile(r"│\s*seconds\s*│\s*(\w+)\s*│\s*([\d.]+)\s*│")
"""A row of the table that the server prints when its engine is ready."""


def start_server(given: Mapping[str, Any], *, environment: Sequence[str]) -> dict[str, float]:
    """Seconds by stage: those that the engine tells, what is beside them, and the first token.

    ``environment`` is ``NAME=value``, for the server alone.
    """
    port = _free_port()
    command = [sys.executable, "-c", MAIN, "serve", *serve_flags(given), "--port", str(port)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        began = time.perf_counter()
        with log.open("w") as file:
            process = subprocess.Popen(["env", "COLUMNS=200", *environment, *command], stderr=file)
        try:
            ready_s, answer = asyncio.run(_first_token(process, port, began=began))
        finally:
            _stop(process)
        if answer is None or answer.error:
            raise NanoflowError(f"a server did not answer: {_last_line(log, answer)}")
        engine = {name: float(seconds) for name, seconds in STAGE.findall(log.read_text())}
    return {"other": ready_s - sum(engine.values()), **engine, "first_answer": answer.ttft_s}


def serve_flags(given: Mapping[str, Any]) -> list[str]:
    """The arguments of ``LLM`` as the command line of ``nanoflow serve`` spells them."""
    flags = {name: value for name, value in given.items() if name not in ("model", "options")}
    flags["compile_options"] = given["options"]
    words = (word for name, value in flags.items() for word in _flag(name, value))
    return [str(given["model"]), "--served-model-name", NAME, *words]


def _flag(name: str, value: object) -> Iterator[str]:
    flag = name.replace("_", "-")
    if value is False and name != "enforce_eager":
        yield f"--no-{flag}"
    elif value is not None and value is not False:
        yield f"--{flag}"
        if value is not True:
            yield json.dumps(value) if isinstance(value, Mapping) else str(value)


async def _first_token(
    process: "subprocess.Popen[bytes]", port: int, *, began: float
) -> tuple[float, Answer | None]:
    """When the server was ready, and its first answer; None if it ended before."""
    http = HttpClient(f"http://127.0.0.1:{port}", headers={})
    while not await _is_healthy(http):
        if process.poll() is not None:
            return 0.0, None
        await asyncio.sleep(POLL_S)
    ready_s = time.perf_counter() - began
    fields = {"temperature": 0, "ignore_eos": True}
    client = OpenAIClient(http, path="/v1/completions", model=NAME, is_chat=False, fields=fields)
    request = BenchRequest(prompt_token_ids=[1, 2, 3], output_len=2)
    return ready_s, await client.ask(request, request_id="1")


async def _is_healthy(http: HttpClient) -> bool:
    try:
        async with http.connect() as connection:
            return (await connection.request("GET", "/health")).status == 200
    except HttpError:
        return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(SHUTDOWN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_line(log: Path, answer: Answer | None) -> str:
    if answer is not None:
        return answer.error
    return (log.read_text().strip().splitlines() or ["no message"])[-1]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
