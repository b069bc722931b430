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

ON_GPU = {"streams", "cuda_graph"}
EACH = [pytest.param(name, marks=pytest.mark.gpu) if name in ON_GPU else name for name in BACKENDS]


def place_of(backend):
    return "cuda" if backend in ON_GPU else "cpu"


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
@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("name", GRAPHS)
def test_outputs_are_those_of_the_graph(name, backend, parts):
    traced = GRAPHS[name](place_of(backend))
    with torch.no_grad():
        expected = traced.run()
    graph = compiled(traced, backend=backend, parts=parts)
    assert graph.executables[-1].num_cells == parts
    for cuts in CUTS[parts]:
        for _ in range(3 if backend == "cuda_graph" else 1):  # launched, captured, replayed
            assert_alike(outputs_of(graph, traced, cuts), expected)


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", GRAPHS)
def test_backends_agree_bit_for_bit(name, place):
    """Without compiled clusters every backend makes the same calls on the same tensors."""
    names = [backend for backend in BACKENDS if place == "cuda" or backend not in ON_GPU]
    graphs = {
        backend: (compiled(traced, backend=backend, parts=3), traced)
        for backend, traced in ((backend, GRAPHS[name](place)) for backend in names)
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


@pytest.mark.parametrize("backend", EACH)
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
    inputs = {name: tensor.to(place_of(backend)) for name, tensor in inputs.items()}
    traced = trace(store, inputs, tokens={"x": 0, "cache": 0})
    own = {name: tensor.clone() for name, tensor in inputs.items()}
    expected = store(**own)
    graph = compiled(traced, backend=backend, parts=2)
    assert_alike(outputs_of(graph, traced, (0, 3, 7)), expected)
    assert torch.equal(inputs["cache"], own["cache"])


@pytest.mark.parametrize("backend", EACH)
def test_source_and_close(backend):
    traced = make_block(place_of(backend))
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
