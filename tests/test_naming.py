"""Placeholders carry the names of the model."""

import torch
from torch import fx, nn

from nanoflow_compiler.naming import input_names, name_placeholders

SCALE = torch.ones(3)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])
        self.register_buffer("running_mean", torch.zeros(3))

    def forward(self, input_ids, *, cache):
        hidden = self.layers[1](self.layers[0](input_ids)) * SCALE
        return hidden + self.running_mean + cache["keys"][0] + input_ids.shape[0]


def names_in_dynamo(model, *args, **kwargs):
    found = []

    def backend(module, _inputs):
        found.extend(input_names(module))
        return module.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(*args, **kwargs)
    return found


def test_names_of_parameters_buffers_arguments_and_sizes():
    x = torch.ones(4, 3)
    torch._dynamo.mark_dynamic(x, 0)
    assert set(names_in_dynamo(Model(), x, cache={"keys": [torch.ones(3)]})) == {
        "input_ids",
        "input_ids_size_0",
        "layers_0_weight",
        "layers_1_weight",
        "running_mean",
        "SCALE",
        "cache_keys_0",
    }


def graph_with_inputs(*names):
    graph = fx.Graph()
    graph.output(tuple(graph.placeholder(name) for name in names))
    return fx.GraphModule(nn.Module(), graph)


def test_names_are_unique_and_can_be_variables():
    module = graph_with_inputs("arg0_1", "arg1_1", "arg2_1", "arg3_1")
    names = name_placeholders(module, ["weight", "weight", "lambda", "arg3_1"])
    assert names == ["weight", "weight_1", "lambda_1", "arg3_1"]
    assert [node.target for node in module.graph.find_nodes(op="placeholder")] == names
    assert module(1, 2, 3, 4) == (1, 2, 3, 4)


def test_a_placeholder_of_which_nothing_is_known_keeps_its_name():
    assert input_names(graph_with_inputs("primals_1")) == ["primals_1"]
