"""Graphs that every backend has to compute, and where their tokens may be cut."""

import torch
from torch.func import functional_call

from tiny_models import llama
from traces import trace

TOKENS = 7
CUTS = {
    1: [(0, 7)],
    2: [(0, 3, 7), (0, 1, 7), (0, 6, 7)],
    3: [(0, 2, 4, 7), (0, 1, 2, 7), (0, 4, 6, 7)],
}


def make_block(place="cpu"):
    """A gated block between a norm and a sum over all tokens so far, which no part can do alone."""

    def block(x, positions, table, scale, gate, up, down):
        hidden = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * scale
        hidden = hidden + table[positions]
        gated = torch.nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)
        running = (gated @ down.T).cumsum(0)
        return x + running / (positions + 1)[:, None], hidden[:, ::2], running.amax(-1)

    generator = torch.Generator().manual_seed(0)
    shapes = {"table": (11, 16), "scale": (16,), "gate": (24, 16), "up": (24, 16), "down": (16, 24)}
    weights = {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(place))
        for name, shape in shapes.items()
    }
    tokens = {
        "x": torch.randn(TOKENS, 16, generator=generator),
        "positions": torch.randint(0, 11, (TOKENS,), generator=generator),
    }
    tokens = {name: tensor.to(place) for name, tensor in tokens.items()}
    seeds = dict.fromkeys(tokens, 0)
    return trace(block, tokens | weights, tokens=seeds, weights=tuple(weights))


def make_llama(place="cpu"):
    """The whole of a decoder on a batch: here a token of the graph is a prompt."""
    model = llama().to(place)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    names = {name.replace(".", "_"): name for name in tensors}

    def logits(input_ids, **given):
        own = {names[name]: tensor for name, tensor in given.items()}
        kwargs = {"input_ids": input_ids, "use_cache": False}
        return (functional_call(model, own, args=(), kwargs=kwargs).logits,)

    generator = torch.Generator().manual_seed(0)
    ids = {"input_ids": torch.randint(3, 128, (TOKENS, 5), generator=generator).to(place)}
    fixed = {name: tensors[names[name]] for name in names}
    weights = tuple(n for n, tensor in fixed.items() if isinstance(tensor, torch.nn.Parameter))
    return trace(logits, ids | fixed, tokens={"input_ids": 0}, weights=weights)


GRAPHS = {"block": make_block, "llama": make_llama}


def assert_alike(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
