"""One real decoder as the compiler sees it, traced once for all tests that look at it."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import fx

from nanoflow_compiler.capture import capture_step
from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.ir import OpGraph
from nanoflow_compiler.models.hf import PackedDecoder
from nanoflow_compiler.pipeline import CapturedGraph, analyse
from nanoflow_compiler.stepper import Stepper
from tiny_models import MAX_LENGTH, llama

NUM_LAYERS = 3


@dataclass(frozen=True)
class Analysed:
    """The annotated module with its operations; not to be changed."""

    captured: CapturedGraph
    ops: OpGraph

    @property
    def module(self) -> fx.GraphModule:
        return self.captured.module


@cache
def packed_llama(tokens: int = 512, **options: Any) -> Analysed:
    """One packed step of a tiny Llama, with these options of the compiler."""
    packed = PackedDecoder(llama(num_hidden_layers=NUM_LAYERS), max_length=MAX_LENGTH)
    captured = capture_step(packed, tokens=tokens)
    return Analysed(captured, analyse(captured, config=CompileConfig(**options), step=Stepper()))
