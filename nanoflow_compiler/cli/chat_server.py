"""Answers of a server that speaks OpenAI's API."""

import json
from collections.abc import Generator, Iterator, Mapping
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from nanoflow_compiler.cli.chat_session import Message
from nanoflow_compiler.errors import ConfigError, NanoflowError

__all__ = ["ServerChat"]


class ServerChat:
    """One model of one server."""

    def __init__(
        self, url: str, *, model: str | None, api_key: str | None, sampling: Mapping[str, Any]
    ) -> None:
        """Without a ``model``, the server's first; ``sampling`` are further fields of requests."""
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--url {url} is no address; pass such as http://127.0.0.1:8000/v1")
        self.url = url.rstrip("/")
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._sampling = sampling
        self.model = model or self._first_model()

    def answer(self, messages: list[Message]) -> Generator[str, None, None]:
        """The pieces of text as the server sends them; leaving early makes the server stop."""
        body = {"model": self.model, "messages": messages, "stream": True, **self._sampling}
        with self._open("/chat/completions", body) as response:
            try:
                for line in response:
                    if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                        yield from _text(json.loads(data))
            except (OSError, HTTPException, ValueError) as error:
                raise NanoflowError(f"the answer of {self.url} broke off: {error!r}") from error

    def _first_model(self) -> str:
        with self._open("/models") as response:
            models = json.load(response)["data"]
        if not models:
            raise NanoflowError(f"{self.url} offers no model")
        name: str = models[0]["id"]
        return name

    def _open(self, path: str, body: object = None) -> HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        try:
            response: HTTPResponse = urlopen(
                Request(self.url + path, data=data, headers=self._headers)
            )
        except HTTPError as error:
            raise NanoflowError(f"{self.url}: {_message(error)}") from error
        except (OSError, HTTPException) as error:
            raise NanoflowError(
                f"{self.url} cannot be reached ({getattr(error, 'reason', error)}): start it with "
                "nanoflow serve MODEL, or chat without a server: nanoflow chat MODEL"
            ) from error
        return response


def _text(chunk: dict[str, Any]) -> Iterator[str]:
    if error := chunk.get("error"):
        raise NanoflowError(str(error.get("message", error)))
    for choice in chunk.get("choices", ()):
        if content := (choice.get("delta") or {}).get("content"):
            yield content


def _message(error: HTTPError) -> str:
    """In OpenAI's form, or what there is."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {error.code} {error.reason}"
