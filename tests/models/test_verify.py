"""Models that would be wrong when packed are found out; all that can be packed pass."""

import pytest
import torch
import transformers as hf

from nanoflow_compiler.errors import UnsupportedGraphError
from nanoflow_compiler.models.hf import PackedDecoder
from nanoflow_compiler.models.verify import verify_packed
from tiny_models import BUILDERS, COMMON, build

PACKABLE = sorted(BUILDERS)


@pytest.mark.parametrize("name", PACKABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_can_be_packed_passes(name, dtype):
    verify_packed(PackedDecoder(BUILDERS[name]().to(dtype), max_length=64))


def lfm2():
    return build(hf.Lfm2Config(**COMMON, layer_types=["conv", "full_attention"]))


def minimax():
    layers = ["linear_attention", "full_attention"]
    return build(hf.MiniMaxConfig(**COMMON, num_local_experts=2, layer_types=layers))


@pytest.mark.parametrize("make", [lfm2, minimax])
def test_tokens_that_mix_outside_attention_are_found(make):
    with pytest.raises(UnsupportedGraphError, match="requests are packed"):
        verify_packed(PackedDecoder(make(), max_length=64))


def test_a_wrong_window_is_found():
    packed = PackedDecoder(BUILDERS["llama"](), max_length=64)
    for module in packed.modules():
        if hasattr(module, "nanoflow_calls"):
            module.nanoflow_calls = [(layer, 2, 0) for layer, _, _ in module.nanoflow_calls]
    with pytest.raises(UnsupportedGraphError, match="relative error"):
        verify_packed(packed)
