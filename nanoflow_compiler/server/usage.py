"""Counts of tokens, as clients are told them."""

from collections.abc import Iterable

from msgspec import UNSET

from nanoflow_compiler.server.engine_client import Completion, Output
from nanoflow_compiler.server.responses import Usage

__all__ = ["usage_of", "usage_so_far"]


def usage_of(outputs: Iterable[Output]) -> Usage:
    """Of a whole request; a prompt counts once, however many completions it has."""
    listed = list(outputs)
    num_in = sum(len(output.prompt_token_ids) for output in listed)
    num_out = sum(len(one.token_ids) for output in listed for one in output.outputs)
    cached = [output.num_cached_tokens for output in listed if output.num_cached_tokens is not None]
    return Usage(
        prompt_tokens=num_in,
        completion_tokens=num_out,
        total_tokens=num_in + num_out,
        prompt_tokens_details={"cached_tokens": sum(cached)} if cached else UNSET,
    )


def usage_so_far(output: Output, completion: Completion) -> Usage:
    """Of one completion while it goes on."""
    num_in, num_out = len(output.prompt_token_ids), len(completion.token_ids)
    return Usage(prompt_tokens=num_in, completion_tokens=num_out, total_tokens=num_in + num_out)
