"""Every backend, on the same graphs: what the graph computes, wherever the tokens are cut."""

import ast

import pytest
import torch

from conformance_cases import CUTS, GRAPHS, TOKENS, assert_alike, make_block
from nanoflow_compiler.backends import BACKENDS, get_backend
from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.errors import ConfigError, InvalidProgramError
from nanoflow_compiler.hardware import DEVICE_SPECS
from nanoflow_compiler.ir import Program
from nanoflow_compiler.pipeline import compile_graph
from nanoflow_compiler.stepper import Stepper
from traces import trace


def compiled(traced, *, backend, parts, clusters="eager"):
    config = CompileConfig(backend=backend, parts=parts, clusters=clusters)
    device = DEVICE_SPECS["a100-80gb"]
    with torch.no_grad():
        return compile_graph(traced.captured, config=config, device=device, step=Stepper())


def outputs_of(graph, traced, cuts):
    with torch.no_grad():
        inputs = graph.binder(list(traced.inputs.values()))
        return graph.executables[-1](inputs, cuts)


@pytest.mark.parametrize("parts", CUTS)
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("name", GRAPHS)
def test_outputs_are_those_of_the_graph(name, backend, parts):
    traced = GRAPHS[name]()
    with torch.no_grad():
        expected = traced.run()
    graph = compiled(traced, backend=backend, parts=parts)
    assert graph.executables[-1].num_cells == parts
    for cuts in CUTS[parts]:
        assert_alike(outputs_of(graph, traced, cuts), expected)


@pytest.mark.parametrize("name", GRAPHS)
def test_backends_agree_bit_for_bit(name):
    """Without compiled clusters every backend makes the same calls on the same tensors."""
    graphs = {
        backend: (compiled(traced, backend=backend, parts=3), traced)
        for backend, traced in ((backend, GRAPHS[name]()) for backend in BACKENDS)
    }
    for cuts in CUTS[3]:
        first, *others = [outputs_of(graph, traced, cuts) for graph, traced in graphs.values()]
        for other in others:
            assert all(map(torch.equal, first, other))


def test_compiled_clusters_serve_any_cut():
    traced = make_block()
    with torch.no_grad():
        expected = traced.run()
    graph = compiled(traced, backend="codegen", parts=3, clusters="inductor")
    assert "cluster_" in graph.executables[-1].source
    for cuts in CUTS[3]:
        assert_alike(outputs_of(graph, traced, cuts), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_writes_to_inputs_arrive(backend):
    def store(x, cache, at):
        before = cache.sum(-1)
        cache.index_copy_(1, at, x[:, None] * 2)
        return before, cache.amax(1) + x

    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(TOKENS, 4, generator=generator),
        "cache": torch.randn(TOKENS, 5, 4, generator=generator),
        "at": torch.tensor([3]),
    }
    traced = trace(store, inputs, tokens={"x": 0, "cache": 0})
    own = {name: tensor.clone() for name, tensor in inputs.items()}
    expected = store(**own)
    graph = compiled(traced, backend=backend, parts=2)
    assert_alike(outputs_of(graph, traced, (0, 3, 7)), expected)
    assert torch.equal(inputs["cache"], own["cache"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_source_and_close(backend):
    traced = make_block()
    graph = compiled(traced, backend=backend, parts=2)
    executable = graph.executables[-1]
    if backend == "reference":
        assert str(Program.parse(executable.source)) == executable.source
    else:
        (function,) = ast.parse(executable.source).body[1:]
        assert function.name == "run"
    graph.close()
    with pytest.raises(InvalidProgramError, match="run: this executable is closed"):
        outputs_of(graph, traced, (0, 3, 7))


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(ConfigError, match=f"one of {', '.join(BACKENDS)}, not 'stone'"):
        get_backend("stone")
