"""Packed GEMMs: the numbers of ATen's, for weights that nothing else reads, and fresh when those change."""

import pytest
import torch

from nanoflow_compiler.backends import gemm_timing, gemms
from nanoflow_compiler.backends.gemm_timing import GemmShape, GemmTiming, time_packed
from nanoflow_compiler.backends.gemms import choose_packed
from nanoflow_compiler.backends.packing import can_pack, pack, packed_addmm, packed_mm
from nanoflow_compiler.backends.unit import Unit
from nanoflow_compiler.engine.llm import LLM
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.passes.lift import bound_nodes
from tiny_models import gpt2, llama
from traces import trace

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 64, 513])
@pytest.mark.parametrize(("depth", "columns"), [(8, 8), (96, 33), (1, 5)])
def test_the_numbers_of_aten(rows, depth, columns, dtype):
    if not can_pack(dtype):
        pytest.skip(f"oneDNN does not compute in {dtype} on this processor")
    x, weight = randn(rows, depth).to(dtype), randn(depth, columns).to(dtype)
    bias = randn(columns).to(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {}
    packed = pack(weight)
    torch.testing.assert_close(packed_mm(x, packed), x @ weight, **tolerance)
    expected = torch.addmm(bias, x, weight)
    torch.testing.assert_close(packed_addmm(bias, x, packed), expected, **tolerance)


def test_rows_that_lie_apart():
    wide, weight = randn(6, 40), randn(16, 12)
    for x in (wide[:, 8:24], wide[::2, :16], wide.new_zeros(16, 6).t(), wide[:1, 8:24]):
        torch.testing.assert_close(packed_mm(x, pack(weight)), x @ weight)


def packed_names(function, *, mode="packed", **inputs):
    """The parameters, by name, whose GEMMs would run packed."""
    parameters = tuple(name for name in inputs if name != "x")
    traced = trace(function, inputs, tokens={"x": 0}, weights=parameters)
    ops = traced.analyse()
    bound = bound_nodes(traced.module, traced.weights)
    fixed = traced.weights | {node.name for node in bound}
    names = choose_packed(Unit.of(ops, traced.module), fixed=fixed, mode=mode).packed
    nodes = {node.name: node for node in traced.module.graph.nodes}
    return {(nodes[name].all_input_nodes or [nodes[name]])[0].name for name in names}


def test_weights_of_gemms_and_of_nothing_else():
    given = {"x": randn(4, 8), "c": randn(8), **{name: randn(8, 8) for name in "abd"}}

    def function(x, c, a, b, d):
        return x @ a.t() @ b + c, torch.addmm(c, x, d)

    assert packed_names(function, **given) == {"a", "b", "d"}
    assert packed_names(function, mode="aten", **given) == set()


def test_a_weight_that_is_also_a_left_operand():
    square = randn(8, 8)
    assert packed_names(lambda x, a: (x @ a, a @ a), x=randn(4, 8), a=square) == set()


def test_a_tied_head_is_packed_beside_the_embedding():
    def function(x, table):
        return torch.nn.functional.embedding(x.argmax(-1), table) @ table.t()

    assert packed_names(function, x=randn(4, 8), table=randn(24, 8)) == {"table"}


def test_auto_takes_what_measured_faster(monkeypatch):
    def timed(shape):
        return GemmTiming(share=0.5 if shape.columns == 24 else 1.5, is_steady=True)

    monkeypatch.setattr(gemms, "_FEWEST_BYTES", 0)
    monkeypatch.setattr(gemms, "time_packed", timed)
    given = {
        "x": randn(4, 8),
        "wide": randn(24, 8),
        "back": randn(8, 24),
    }

    def function(x, wide, back):
        return torch.relu(x @ wide.t()) @ back.t()

    assert packed_names(function, mode="auto", **given) == {"wide"}
    monkeypatch.setattr(gemms, "available_memory_bytes", lambda: 24 * 8 * 4)
    assert packed_names(function, mode="auto", **given) == set()


@pytest.fixture
def quick_measurement(monkeypatch):
    monkeypatch.setattr(gemms, "_FEWEST_BYTES", 0)
    monkeypatch.setattr(gemm_timing, "_COLD_BYTES", 1 << 12)
    monkeypatch.setattr(gemm_timing, "_SECONDS", 0)
    time_packed.cache_clear()
    yield
    time_packed.cache_clear()


@pytest.mark.usefixtures("quick_measurement")
def test_the_measurement_ends_with_an_answer(monkeypatch):
    monkeypatch.setattr(gemm_timing, "_FEWEST_CPU_SECONDS", 0)
    timing = time_packed(GemmShape(64, 32, torch.float32))
    assert timing.is_steady
    assert timing.share > 0


@pytest.mark.usefixtures("quick_measurement")
def test_what_a_busy_machine_measures_does_not_count(monkeypatch):
    monkeypatch.setattr(gemm_timing, "_FEWEST_CPU_SECONDS", float("inf"))
    monkeypatch.setattr(gemm_timing, "_WORTH", 0)
    timing = time_packed(GemmShape(64, 32, torch.float32))
    assert not timing.is_steady
    assert timing.is_worth_it


@pytest.mark.usefixtures("quick_measurement")
def test_measured_while_dynamo_compiles(monkeypatch, tmp_path):
    monkeypatch.setattr(gemm_timing, "_WORTH", float("inf"))
    linear, x = torch.nn.Linear(24, 8), randn(4, 24)
    options = {"dump": tmp_path}
    compiled = torch.compile(linear, backend="nanoflow", options=options, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), linear(x))
    (source,) = tmp_path.glob("*/program_0.py")
    assert "fn_packed_addmm" in source.read_text()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_changed_weights_are_packed_again(build, parts):
    model = build()
    options = {"gemms": "packed", "parts": parts, "clusters": "eager"}
    compiled = torch.compile(model, backend="nanoflow", options=options)
    ids = torch.arange(3, 23).reshape(2, 10)

    def check():
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits
            found = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    check()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    check()
    model.load_state_dict(build().state_dict())
    check()


def test_graphs_of_one_model_share_the_packed_copies():
    linear, other = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)

    def packed(module):
        return pack(module.weight.t(), made_of=[module.weight])

    first = packed(linear)
    assert packed(linear) is first
    assert packed(other) is not first
    with torch.no_grad():
        linear.weight.mul_(2)
    second = packed(linear)
    assert second is not first
    assert pack(linear.weight.t()) is not second
    x = randn(3, 8)
    torch.testing.assert_close(packed_mm(x, second), linear(x))
    linear.weight.data = randn(8, 8)
    torch.testing.assert_close(packed_mm(x, packed(linear)), linear(x))


def test_the_engine_on_packed_weights():
    params = SamplingParams(temperature=0, max_tokens=6)
    prompts = [{"prompt_token_ids": [5, 6, 7, 8, 9]}, {"prompt_token_ids": [11]}]

    def tokens(**settings):
        with LLM(llama(), **settings) as llm:
            return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

    options = {"gemms": "packed", "clusters": "eager"}
    assert tokens(options=options) == tokens(enforce_eager=True)
