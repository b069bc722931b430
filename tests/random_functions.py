"""Random functions of torch with a token axis: what decoders are made of, in an order no one wrote.

A function is drawn by running it: each step picks an operation and operands among the values so far,
and is kept if torch accepts their shapes. Some steps mix tokens, some make what does not depend on
them, and a state that is an input may be written at the end, as a static KV cache is.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from traces import Trace, trace

TOKENS = 7
"""A size that nothing else has."""
WIDTHS = (4, 6)
STATE = 5
MOST_ELEMENTS = 3000

Step = tuple[Callable[..., Any], tuple[int, ...]]


def _heads(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:-1], 2, -1)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1)


def _fold(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def _halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _attend(x: Tensor) -> Tensor:
    """Batch entries apart where there are three dimensions, tokens with tokens where two."""
    scores = x @ x.transpose(-1, -2) * 0.1
    return scores.softmax(-1) @ x


def _tokens_last(x: Tensor) -> Tensor:
    return x.transpose(0, -1)


def _turned(x: Tensor) -> Tensor:
    return x.flip(0)


def _best(x: Tensor) -> Tensor:
    return x.topk(2, -1).values


ONE: list[Callable[[Tensor], Tensor]] = [
    *(torch.relu, torch.sigmoid, torch.neg, torch.clone, functional.silu, _norm, _halves, _heads),
    *(_flat, _fold, _attend, _tokens_last, _turned, _best),
    lambda x: x * 1.0,
    lambda x: x[..., 1:],
    lambda x: x[1:2],
    lambda x: x.unsqueeze(1),
    lambda x: x.squeeze(1),
    lambda x: x.softmax(-1),
    lambda x: x.cumsum(0),
    lambda x: x.mean(0, keepdim=True),
    lambda x: x.sum(-1),
    lambda x: x.mean(-1, keepdim=True),
    lambda x: x.amax((0, -1)),
    lambda x: functional.layer_norm(x, x.shape[-1:]),
    lambda x: x.expand(x.shape[0], 3, *x.shape[2:]),
    lambda x: torch.ones_like(x),
    lambda x: torch.arange(x.shape[0], dtype=x.dtype)[:, None] * x,
    lambda x: x.double().to(x.dtype),
]
TWO: list[Callable[[Tensor, Tensor], Tensor]] = [
    *(torch.add, torch.mul, torch.maximum, torch.matmul),
    lambda x, y: torch.cat([x, y], -1),
    lambda x, y: torch.stack([x, y], 1),
    lambda x, y: torch.where(x > 0, x, y),
    lambda x, y: x @ y.t(),
    lambda x, y: functional.linear(x, y),
    lambda x, y: functional.silu(x) * y,
]


@dataclass
class Drawn:
    """Steps over values, of which the first are the inputs."""

    inputs: dict[str, Tensor] = field(repr=False)
    steps: list[Step] = field(default_factory=list)
    outputs: tuple[int, ...] = ()
    writes_state: Callable[..., Tensor] | None = None
    state_source: int = 0

    def __call__(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        values = list(inputs.values())
        for operation, operands in self.steps:
            values.append(operation(*(values[at] for at in operands)))
        results = [values[at] for at in self.outputs]
        if self.writes_state is not None:
            state = self.writes_state(inputs["state"], inputs["places"], values[self.state_source])
            results.append(state.sum(-1))
            inputs["state"].copy_(state)
        return tuple(results)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        del cycle
        names = [*self.inputs, *(f"v{at}" for at in range(len(self.steps)))]
        for at, (operation, operands) in enumerate(self.steps):
            line = (
                inspect.getsource(operation).strip()
                if "lambda" in str(operation)
                else operation.__name__
            )
            printer.text(f"v{at} = {line} of {[names[i] for i in operands]}\n")
        printer.text(f"outputs {[names[at] for at in self.outputs]}")
        if self.writes_state is not None:
            printer.text(f", {self.writes_state.__name__} of {names[self.state_source]}")

    def trace(self) -> Trace:
        names = dict.fromkeys(("x", "y"), 0)
        names["state" if self.writes_state is _write_entries else "places"] = 0
        weights = tuple(name for name in self.inputs if name.startswith("w"))
        return trace(self, self.inputs, tokens=names, weights=weights)


def _write_entries(state: Tensor, places: Tensor, source: Tensor) -> Tensor:
    """A static cache: each batch entry writes at the same place of its own."""
    del places
    return state.index_copy(1, torch.tensor([2]), source[:, None, :4])


def _write_tokens(state: Tensor, places: Tensor, source: Tensor) -> Tensor:
    """A paged cache: each token has a place."""
    return state.index_put((places,), source[:, None, :4].expand(-1, STATE, -1))


def _inputs(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    narrow, wide = WIDTHS
    return {
        "x": random(TOKENS, narrow),
        "y": random(TOKENS, wide),
        "w0": random(wide, narrow),
        "w1": random(narrow, narrow),
        "w2": random(narrow, wide),
        "w3": random(narrow),
        "shared": random(1, narrow),
        "state": random(TOKENS, STATE, 4),
        "places": torch.randperm(TOKENS, generator=generator),
    }


@st.composite
def functions(draw: Any, *, most_steps: int = 16) -> Drawn:
    """A random function; all floats are doubles, so that rounding hides nothing."""
    drawn = Drawn(_inputs(draw(st.integers(0, 1 << 16))))
    values = list(drawn.inputs.values())
    start = len(values)
    readable = list(range(start - 2))  # neither the state nor the places
    for _ in range(draw(st.integers(1, most_steps)) * 2):  # half of them do not fit
        pool = ONE if draw(st.booleans()) else TWO
        operation = draw(st.sampled_from(pool))
        first = [0, 1, *readable[start - 2 :]]
        second = [draw(st.sampled_from(readable))] if pool is TWO else []
        operands = (draw(st.sampled_from(first)), *second)
        if (made := _attempt(operation, [values[at] for at in operands])) is not None:
            readable.append(len(values))
            values.append(made)
            drawn.steps.append((operation, operands))
    last = len(values) - 1
    made_here = [at for at in readable if at >= start] or [0]
    picked = draw(st.lists(st.sampled_from(made_here), max_size=2))
    drawn.outputs = tuple(dict.fromkeys([last if last >= start else 0, *picked]))
    _maybe_write(draw, drawn, values)
    return drawn


def _maybe_write(draw: Any, drawn: Drawn, values: list[Tensor]) -> None:
    if not draw(st.booleans()):
        return
    fits = [
        at
        for at, value in enumerate(values)
        if value.ndim == 2 and value.shape[0] == TOKENS and value.shape[1] >= 4
    ]
    drawn.state_source = draw(st.sampled_from(fits))
    drawn.writes_state = draw(st.sampled_from([_write_entries, _write_tokens]))


def _attempt(operation: Callable[..., Tensor], operands: list[Tensor]) -> Tensor | None:
    try:
        made = operation(*operands)
    except (RuntimeError, IndexError, ValueError):
        return None
    few = 0 < made.numel() <= MOST_ELEMENTS
    return made if few and made.abs().max() < 1e6 and made.ndim <= 4 else None
