"""Captured steps without CUDA: a graph that launches again what it was made from."""

from dataclasses import replace

import torch

from nanoflow_compiler import paged_attention
from nanoflow_compiler.attention_state import AttentionPart
from nanoflow_compiler.engine import step_graphs
from nanoflow_compiler.engine.draw import Draw, draw
from nanoflow_compiler.engine.sampled import Sampled
from nanoflow_compiler.kv_cache import BLOCK_SIZE


class FakeGraph:
    """Reads what lies in the memory that it was captured with, and writes where it wrote then."""

    def __init__(self, launch, pool):
        self.launch = launch
        self.pool = pool
        # Made outside inference mode, so that it may be written there.
        self.outputs = tuple(torch.zeros(out.shape, dtype=out.dtype) for out in launch())

    def replay(self):
        """As on a device, the outputs of all other graphs are gone."""
        self.pool.num_replays += 1
        for graph in self.pool.graphs:
            for output in graph.outputs:
                output.fill_(-1)
        for output, found in zip(self.outputs, self.launch(), strict=True):
            output.copy_(found)


class FakePool:
    """In place of a ``GraphPool``."""

    def __init__(self):
        self.graphs = []
        self.num_replays = 0

    def capture(self, launch):
        graph = FakeGraph(launch, self)
        self.graphs.append(graph)
        return graph, graph.outputs


class HostPlan(paged_attention.Plan):
    """Nothing is copied to it: it is made anew when a step asks where its plans go."""

    __slots__ = ("key",)

    def inputs(self, requests):
        plan = paged_attention._plan(requests, self.key)
        object.__setattr__(self, "groups", plan.groups)
        return iter(())


def plan_with_room(key, room):
    assert room.num_decode_pages > 0
    plan = HostPlan(())
    object.__setattr__(plan, "key", key)
    return plan


def draw_rows(logits, settings):
    """What the kernel draws: rows of any settings, greedy ones among them."""
    tokens = logits.argmax(-1)
    is_drawn = (settings.temperature > 0) & (settings.limit > 1)
    names = Draw.__slots__
    for row in is_drawn.nonzero()[:, 0].tolist():
        own = Draw(*(getattr(settings, name)[row : row + 1, None] for name in names))
        tokens[row] = draw(logits[row : row + 1], own, num_ordered=logits.shape[-1])[0]
    return tokens


def fake_cuda(monkeypatch):
    """From now on steps can be captured on a CPU."""
    monkeypatch.setattr(step_graphs, "GraphPool", FakePool)
    monkeypatch.setattr(step_graphs, "draw_on_gpu", draw_rows)
    monkeypatch.setattr(paged_attention.PlanKey, "with_room", plan_with_room)
    monkeypatch.setattr(Sampled, "sent", sent)
    # The kernels of a GPU read the slots themselves: nothing that depends on them is kept.
    monkeypatch.setattr(AttentionPart, "places", property(places_of))


def sent(sampled):
    """A copy of the tokens, as is brought to the host from a device."""
    return replace(sampled, tokens=sampled.tokens.clone())


def places_of(part):
    return part.slots // BLOCK_SIZE, part.slots % BLOCK_SIZE


def capture(llm, buckets):
    """The pool of an engine whose steps of these sizes are captured."""
    runner = llm._core.runner
    list(runner.capture(buckets, max_model_len=llm.limits.max_model_len))
    return runner.graphs._pool
