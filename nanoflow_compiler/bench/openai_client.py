"""Asks an OpenAI-compatible server, and notes when each token came."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nanoflow_compiler.bench.dataset import BenchRequest
from nanoflow_compiler.bench.http import HttpClient, HttpError, Response

__all__ = ["Answer", "OpenAIClient"]


@dataclass(slots=True)
class Answer:
    """What came of one request; times are seconds."""

    prompt_len: int
    start_s: float = 0.0
    """When the request was sent, by :func:`time.perf_counter`."""
    ttft_s: float = 0.0
    itls_s: list[float] = field(default_factory=list)
    """Between tokens that follow each other."""
    latency_s: float = 0.0
    """From the request to the last token."""
    output_len: int = 0
    text: str = ""
    error: str = ""
    """Why it failed; empty if it did not."""

    @property
    def tpot_s(self) -> float:
        """Mean time of a token after the first; 0 if there is no other."""
        later = self.output_len - 1
        return (self.latency_s - self.ttft_s) / later if later > 0 else 0.0

    def on_token(self, text: str) -> None:
        """A piece of the stream that holds a token."""
        since = time.perf_counter() - self.start_s
        if self.ttft_s:
            self.itls_s.append(since - self.latency_s)
        else:
            self.ttft_s = since
        self.latency_s = since
        self.text += text


class OpenAIClient:
    """One server, one model, one way of asking."""

    def __init__(
        self,
        http: HttpClient,
        *,
        path: str,
        model: str,
        is_chat: bool,
        fields: Mapping[str, Any],
    ) -> None:
        """``fields`` are added to every body."""
        self.http = http
        self.path = path
        self.model = model
        self.is_chat = is_chat
        self.fields = fields

    async def ask(self, request: BenchRequest, *, request_id: str) -> Answer:
        """Never raises for what the server does: a failed answer says why."""
        answer = Answer(prompt_len=len(request.prompt_token_ids))
        try:
            async with self.http.connect() as connection:
                body, headers = self._body(request), {"x-request-id": request_id}
                answer.start_s = time.perf_counter()
                response = await connection.request("POST", self.path, body=body, headers=headers)
                if response.status == 200:
                    await self._follow(response, answer)
                else:
                    answer.error = f"status {response.status}: {_message(await response.read())}"
        except HttpError as error:
            answer.error = str(error)
        if not answer.error and not answer.ttft_s:
            answer.error = "the stream ended without a token"
        return answer

    def _body(self, request: BenchRequest) -> dict[str, Any]:
        common = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        if self.is_chat:
            content = [{"type": "text", "text": request.text}]
            asked: dict[str, Any] = {
                "messages": [{"role": "user", "content": content}],
                "max_completion_tokens": request.output_len,
            }
        else:
            prompt = request.prompt_token_ids if request.text is None else request.text
            asked = {"prompt": prompt, "max_tokens": request.output_len}
        return {**common, **asked, **self.fields}

    async def _follow(self, response: Response, answer: Answer) -> None:
        async for line in response.lines():
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                break
            self._read_chunk(json.loads(data), answer)
        answer.output_len = answer.output_len or (len(answer.itls_s) + 1 if answer.ttft_s else 0)

    def _read_chunk(self, chunk: dict[str, Any], answer: Answer) -> None:
        if error := chunk.get("error"):
            answer.error = str(error.get("message", error) if isinstance(error, dict) else error)
        if choices := chunk.get("choices"):
            self._read_choice(choices[0], answer)
        if usage := chunk.get("usage"):
            answer.output_len = usage.get("completion_tokens") or 0
            answer.prompt_len = usage.get("prompt_tokens") or answer.prompt_len

    def _read_choice(self, choice: dict[str, Any], answer: Answer) -> None:
        if not self.is_chat:
            answer.on_token(choice.get("text") or "")
            return
        delta = choice.get("delta") or {}
        text = delta.get("content") or delta.get("reasoning_content") or ""
        # The first chunk of a chat tells the role, and comes before any token.
        if text or "role" not in delta:
            answer.on_token(text)


def _message(body: bytes) -> str:
    """Of an error in OpenAI's form, or what there is."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
