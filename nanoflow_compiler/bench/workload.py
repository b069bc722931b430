"""What requests ask of a model: tokens by kind, and how many requests can run at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from nanoflow_compiler.bench.dataset import BenchRequest

__all__ = ["Workload"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Sums over requests that are answered at full length, and a step in the middle of the run."""

    num_input: int
    num_output: int
    num_decodes: int
    """Tokens that are computed one at a time: all of an answer but the last."""
    mean_context: int
    """Keys that the attention of a decode reads, its own included."""
    tokens_per_step: int
    decode_rows: int
    """Requests that run at once."""

    @classmethod
    def of(cls, requests: Sequence[BenchRequest], facts: Mapping[str, Any]) -> Self:
        """``facts`` are those of the engine.

        As many requests run as its limits allow: ``max_num_seqs``, the blocks of the KV cache, and the
        token budget, in which prompts take the share that they have of all tokens.
        """
        lengths = [(len(request.prompt_token_ids), request.output_len) for request in requests]
        num_input = sum(prompt for prompt, _ in lengths)
        num_output = sum(answer for _, answer in lengths)
        num_decodes = num_output - len(lengths)
        read = sum((answer - 1) * (prompt + answer / 2) for prompt, answer in lengths)
        mean_context = max(1, round(read / num_decodes)) if num_decodes else 1
        budget = facts["max_num_batched_tokens"]
        cache_tokens = facts["num_kv_blocks"] * facts["block_size"]
        most = (
            len(lengths),
            facts["max_num_seqs"],
            budget * num_output // (num_input + num_output),
            cache_tokens // mean_context,
        )
        return cls(
            num_input=num_input,
            num_output=num_output,
            num_decodes=num_decodes,
            mean_context=mean_context,
            tokens_per_step=min(budget, num_input + num_output),
            decode_rows=max(1, min(most)),
        )

    @property
    def num_tokens(self) -> int:
        """Of prompts and answers."""
        return self.num_input + self.num_output

    @property
    def num_computed(self) -> int:
        """Tokens that go through the layers: nobody computes the last one of an answer."""
        return self.num_input + self.num_decodes
