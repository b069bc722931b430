"""One request on its way through the engine."""

from dataclasses import dataclass, field
from typing import Literal

from nanoflow_compiler.engine.sampling_params import SamplingParams

__all__ = ["FinishReason", "Request"]

FinishReason = Literal["stop", "length", "abort"]


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """A prompt, the tokens generated so far, and the blocks that hold their keys and values."""

    request_id: int
    """Also the order of arrival."""
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    """What ``params`` ask for, bounded by the model's context."""
    seed: int
    token_ids: list[int] = field(init=False)
    """The prompt, then the output."""
    num_computed: int = 0
    """Tokens whose keys and values are stored, or will be by a batch that is already formed."""
    blocks: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        """Begin with the prompt."""
        self.token_ids = list(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def num_pending(self) -> int:
        """Known tokens that no batch has computed: 1 in decode, more in prefill."""
        return len(self.token_ids) - self.num_computed

    @property
    def max_stored_tokens(self) -> int:
        """Tokens in the cache when it ends; the last one sampled is never stored."""
        return len(self.prompt_token_ids) + self.max_tokens - 1
