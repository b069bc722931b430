"""Layers that are alike are traced once, and the graph is what it would be without that."""

import pytest
import torch
from torch import Tensor, fx
from transformers.models.llama import modeling_llama

from nanoflow_compiler import repeats as repeats_module
from nanoflow_compiler.capture import capture_step
from nanoflow_compiler.models.hf import PackedDecoder
from tiny_models import BUILDERS, MAX_LENGTH, llama

NUM_LAYERS = 4
NO_LAYERS: list[torch.nn.Module] = []


@pytest.fixture
def repeated(monkeypatch):
    """How many layers were repeated in each trace."""
    counts: list[repeats_module.LayerRepeats] = []
    make = repeats_module.LayerRepeats.__init__

    def counted(self) -> None:
        make(self)
        counts.append(self)

    monkeypatch.setattr(repeats_module.LayerRepeats, "__init__", counted)
    return counts


def lines(graph: fx.Graph) -> list[str]:
    """The graph with its nodes numbered in order: names depend on nodes that are gone."""
    names: dict[fx.Node, str] = {}
    found = []
    for node in graph.nodes:
        names[node] = f"v{len(names)}"
        args = fx.node.map_arg((node.args, node.kwargs), names.__getitem__)
        found.append(f"{names[node]} {node.op} {node.target} {args} {node.meta.get('val')}")
    return found


def both_traces(model, monkeypatch) -> tuple[list[str], list[str]]:
    packed = PackedDecoder(model, max_length=MAX_LENGTH)
    with monkeypatch.context() as patch:
        patch.setattr(repeats_module, "_layers", lambda _: iter(NO_LAYERS))
        wanted = lines(capture_step(packed).module.graph)
    return lines(capture_step(packed).module.graph), wanted


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama", 3),
        ("gpt2", 3),
        pytest.param("mixtral", 3, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", 2, marks=pytest.mark.slow),
    ],
)
def test_the_graph_is_that_of_a_trace_of_all_layers(name, count, repeated, monkeypatch):
    found, wanted = both_traces(BUILDERS[name](num_hidden_layers=NUM_LAYERS), monkeypatch)
    assert found == wanted
    assert repeated[-1].num_repeated == count


def test_layers_of_other_settings_are_traced_themselves(repeated, monkeypatch):
    model = llama(num_hidden_layers=NUM_LAYERS)
    model.model.layers[2].self_attn.scaling = 0.5
    model.model.layers[3].input_layernorm.variance_epsilon = 1e-3
    found, wanted = both_traces(model, monkeypatch)
    assert found == wanted
    assert repeated[-1].num_repeated == 1


def test_layers_that_look_at_their_number_are_not_repeated(repeated, monkeypatch):
    forward = modeling_llama.LlamaAttention.forward

    def numbered(self, *args, **kwargs):
        out, weights = forward(self, *args, **kwargs)
        return out * (1 + self.layer_idx), weights

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", numbered)
    found, wanted = both_traces(llama(num_hidden_layers=NUM_LAYERS), monkeypatch)
    assert found == wanted
    assert repeated[-1].num_repeated == 0


def test_what_layers_leave_for_others_is_found(repeated, monkeypatch):
    forward = modeling_llama.LlamaMLP.forward
    last: list[Tensor] = []

    def leaving(self, x):
        out = forward(self, x)
        last[:] = [out]
        return out

    head = modeling_llama.LlamaModel.forward

    def reading(self, *args, **kwargs):
        result = head(self, *args, **kwargs)
        result.last_hidden_state = result.last_hidden_state + last[0]
        return result

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", leaving)
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", reading)
    found, wanted = both_traces(llama(num_hidden_layers=NUM_LAYERS), monkeypatch)
    assert not repeated[-1].is_sound
    assert found == wanted


def test_layers_of_a_class_that_cannot_be_watched_are_traced_themselves(repeated, monkeypatch):
    class Demanding(modeling_llama.LlamaMLP):
        def __init_subclass__(cls, *, name: str) -> None:
            super().__init_subclass__()

    model = llama(num_hidden_layers=NUM_LAYERS)
    for layer in model.model.layers:
        layer.mlp.__class__ = Demanding
    found, wanted = both_traces(model, monkeypatch)
    assert found == wanted
    assert repeated[-1].num_repeated == 0
    assert all(type(layer.mlp) is Demanding for layer in model.model.layers)


def test_modules_are_as_they_were(repeated):
    packed = PackedDecoder(llama(num_hidden_layers=NUM_LAYERS), max_length=MAX_LENGTH)
    kinds = [type(module) for module in packed.modules()]
    capture_step(packed)
    assert [type(module) for module in packed.modules()] == kinds
    assert not any("forward" in vars(module) for module in packed.modules())
    assert repeated[-1].num_repeated == NUM_LAYERS - 1
