"""What a step found, on its way from the device to the host."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from nanoflow_compiler.engine.logprobs import TopLogprobs

__all__ = ["Sampled"]


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens ``[S]`` of a step; rows without logprobs hold zeros there."""

    tokens: Tensor
    logprobs: TopLogprobs | None
    prompt_logprobs: TopLogprobs | None = None
    """Of the tokens of prompts, where they were asked for."""
    copied: torch.cuda.Event | None = None
    """When the tensors are there, if they are on their way."""

    def sent(self) -> Self:
        """On the way to the host, behind what the device does now and before all that comes later."""
        if self.tokens.device.type != "cuda":
            return self
        copied = torch.cuda.Event(blocking=True)
        sent = replace(
            self,
            tokens=_to_host(self.tokens),
            logprobs=_top_to_host(self.logprobs),
            prompt_logprobs=_top_to_host(self.prompt_logprobs),
            copied=copied,
        )
        copied.record()
        return sent

    def received(self) -> Self:
        """Where the host can read it: waits until it has arrived."""
        if self.copied is not None:
            self.copied.synchronize()
        return self


def _top_to_host(found: TopLogprobs | None) -> TopLogprobs | None:
    if found is None:
        return None
    return TopLogprobs(
        token_ids=_to_host(found.token_ids),
        logprobs=_to_host(found.logprobs),
        ranks=_to_host(found.ranks),
    )


def _to_host(tensor: Tensor) -> Tensor:
    """To pinned memory, which the device writes while the host goes on."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
