"""Text from tokens, one at a time, and the stop strings in it."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from nanoflow_compiler.engine.sampling_params import SamplingParams

__all__ = ["Detokenizer"]

# Enough of the prompt for the tokenizer to see that the output does not begin a text, where many
# tokenizers drop a leading space.
NUM_PREFIX_TOKENS = 6


class Detokenizer:
    """Grows the text of one request.

    A character may take several tokens: text is held back while it ends in a replacement character.
    Only the tokens since the last complete text are decoded again, so the cost per token is constant.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
    ) -> None:
        self.text = ""
        self.stop_string: str | None = None
        """The one that ended the text."""
        self._tokenizer = tokenizer
        self._params = params
        self._tokens = list(prompt_token_ids[-NUM_PREFIX_TOKENS:])
        self._read = len(self._tokens)
        self._num_tokens = 0

    def append(self, token: int, *, is_hidden: bool = False) -> bool:
        """Add a token, and say whether a stop string ended the text, which is then cut there.

        A hidden token adds no text: it ended the request.
        """
        self._num_tokens += 1
        if is_hidden:
            return False
        self._tokens.append(token)
        before, after = self._decode(self._tokens[: self._read]), self._decode(self._tokens)
        if after.endswith("\N{REPLACEMENT CHARACTER}") or len(after) <= len(before):
            return False
        return self._extend(after[len(before) :])

    def finish(self) -> None:
        """Add what was held back; the bytes of an incomplete character show as replacements."""
        before, after = self._decode(self._tokens[: self._read]), self._decode(self._tokens)
        self._extend(after[len(before) :])

    def _extend(self, text: str) -> bool:
        num_known = len(self.text)
        self.text += text
        self._tokens = self._tokens[self._read :]
        self._read = len(self._tokens)
        return self._num_tokens > self._params.min_tokens and self._cut_at_stop(num_known)

    def _cut_at_stop(self, num_known: int) -> bool:
        """Cut at the stop string that begins first; one may begin in the text that was known."""
        found = [
            (start, len(stop))
            for stop in self._params.stop_strings
            if (start := self.text.find(stop, max(0, num_known - len(stop) + 1))) >= 0
        ]
        if not found:
            return False
        start, length = min(found)
        self.stop_string = self.text[start : start + length]
        end = start + length if self._params.include_stop_str_in_output else start
        self.text = self.text[:end]
        return True

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(tokens), skip_special_tokens=self._params.skip_special_tokens
        )
        assert isinstance(text, str)
        return text
