"""Log-probabilities in the shapes of completions and of chats."""

from collections.abc import Iterator, Sequence
from typing import Any

from nanoflow_compiler.server.engine_client import TokenLogprobs
from nanoflow_compiler.server.responses import ChatLogprob, ChatLogprobs, CompletionLogprobs
from nanoflow_compiler.server.text import TextCodec

__all__ = ["LogprobWriter"]

LEAST = -9999.0
"""In place of minus infinity, which JSON cannot hold; vLLM's number."""


class LogprobWriter:
    """Writes tokens as text, or as ``token_id:N`` where the client asked for that."""

    def __init__(self, codec: TextCodec, *, num_top: int, as_token_ids: bool) -> None:
        self._codec = codec
        self._num_top = num_top
        self._as_token_ids = as_token_ids

    def completion(
        self, token_ids: Sequence[int], found: Sequence[TokenLogprobs | None], *, offset: int
    ) -> CompletionLogprobs:
        """``offset`` is where in the text the first of these tokens begins."""
        texts = [self._name(token) for token in token_ids]
        pieces = [len(self._codec.piece(token)) for token in token_ids]
        offsets = [offset + sum(pieces[:i]) for i in range(len(pieces))]
        return CompletionLogprobs(
            texts,
            [None if one is None else _finite(one.logprobs[0]) for one in found],
            [None if one is None else dict(self._top(one)) for one in found],
            offsets,
        )

    def chat(self, found: Sequence[TokenLogprobs]) -> ChatLogprobs:
        return ChatLogprobs([self._chat_entry(one) for one in found])

    def prompt(self, found: Sequence[TokenLogprobs | None]) -> list[Any]:
        """vLLM's ``prompt_logprobs``: by token id, for each token of the prompt."""
        return [None if one is None else self._prompt_entry(one) for one in found]

    def _chat_entry(self, one: TokenLogprobs) -> ChatLogprob:
        top = [_entry(name, logprob) for name, logprob in self._top(one)]
        name = self._name(one.token_ids[0])
        return ChatLogprob(name, _finite(one.logprobs[0]), list(name.encode()), top)

    def _prompt_entry(self, one: TokenLogprobs) -> dict[str, Any]:
        # The token that is there may be among the likely ones: its rank is known either way.
        ranked = zip(
            one.token_ids, one.logprobs, [one.rank, *range(1, len(one.token_ids))], strict=True
        )
        return {
            str(token): {
                "logprob": _finite(logprob),
                "rank": rank,
                "decoded_token": self._codec.piece(token),
            }
            for token, logprob, rank in ranked
        }

    def _top(self, one: TokenLogprobs) -> Iterator[tuple[str, float]]:
        last = 1 + self._num_top
        for token, logprob in zip(one.token_ids[1:last], one.logprobs[1:last], strict=True):
            yield self._name(token), _finite(logprob)

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._as_token_ids else self._codec.piece(token)


def _entry(name: str, logprob: float) -> ChatLogprob:
    return ChatLogprob(name, logprob, list(name.encode()))


def _finite(logprob: float) -> float:
    return max(float(logprob), LEAST)
