"""Tables of kernels: what is measured is chosen, what is not is left to ATen."""

import json
from dataclasses import replace

import pytest
import torch
from torch import fx

from nanoflow_compiler import kernel_choice, kernel_serving
from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.kernel_choice import (
    ATEN,
    Choice,
    ChoiceTable,
    LinearShape,
    Measured,
    identity_of,
    keep,
    table_of,
)
from nanoflow_compiler.kernel_serving import serving_of

GPU = "A GPU"
SHAPE = LinearShape("linear_add", "bfloat16", 64, 32)
FEW = Choice("few_rows", (("columns", 16), ("uses_dot", True)))
ROWS = [Measured(SHAPE, 1, 4, FEW), Measured(SHAPE, 5, 8, ATEN), Measured(SHAPE, 9, 99, FEW)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOFLOW_CACHE", str(tmp_path))
    table_of.cache_clear()
    yield tmp_path / "kernel_choices.json"
    table_of.cache_clear()


def test_rows_choose():
    table = ChoiceTable.of(ROWS)
    found = [table.choice(SHAPE, num_rows=n) for n in (1, 4, 5, 8, 9, 99, 100)]
    assert found == [FEW, FEW, ATEN, ATEN, FEW, FEW, ATEN]
    assert table.serves(SHAPE)
    other = replace(SHAPE, op="linear")
    assert table.choice(other, num_rows=1) == ATEN
    assert not table.serves(other)


def test_what_aten_does_best_is_not_served():
    assert not ChoiceTable.of([Measured(SHAPE, 1, 9, ATEN)]).serves(SHAPE)


def test_what_was_measured_is_kept(cache):
    empty = identity_of(GPU)
    keep(ROWS, device_name=GPU)
    assert table_of(GPU).choice(SHAPE, num_rows=1) == FEW
    assert identity_of(GPU) != empty
    assert identity_of(GPU, with_measured=False) == empty
    table_of.cache_clear()  # as a later process begins
    assert table_of(GPU).rows == {SHAPE: ROWS}
    assert table_of("another").rows == {}
    assert list(json.loads(cache.read_text())) == [GPU]


def test_the_packaged_table_goes_first(monkeypatch, tmp_path):
    keep(ROWS, device_name=GPU)
    packaged = tmp_path / "packaged.json"
    packaged.write_text(json.dumps({GPU: [Measured(SHAPE, 1, 8, ATEN).as_json()]}))
    monkeypatch.setattr(kernel_choice, "PACKAGED", packaged)
    table_of.cache_clear()
    assert not table_of(GPU).serves(SHAPE)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"A GPU": [{}]}', '{"A GPU": 3}'])
def test_a_broken_file_is_left_out(cache, text):
    cache.write_text(text)
    assert table_of(GPU).rows == {}
    keep(ROWS, device_name=GPU)


def test_every_packaged_row_parses():
    tables = json.loads(kernel_choice.PACKAGED.read_text(encoding="utf-8"))
    for rows in tables.values():
        assert [Measured.parse(row).as_json() for row in rows] == rows


def graph_on(device):
    graph = fx.Graph()
    graph.placeholder("x").meta["val"] = torch.empty(2, 2, device=device)
    graph.output(())
    return fx.GraphModule(torch.nn.Module(), graph)


def test_a_cpu_has_operators_only_where_they_are_asked_for():
    module = graph_on("cpu")
    assert serving_of(module, config=CompileConfig()) is None
    assert serving_of(module, config=CompileConfig(kernels="aten")) is None
    own = serving_of(module, config=CompileConfig(kernels="own"))
    assert own.linear(SHAPE)
    assert own.rotary(torch.empty(2, 2, 3), torch.empty(2, 2, 3))


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(kernel_serving, "_has_kernels", lambda _: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: GPU)
    monkeypatch.setattr(kernel_serving, "_device_of", lambda _: torch.device("cuda"))


@pytest.mark.usefixtures("gpu")
def test_a_gpu_has_what_its_table_has():
    keep(ROWS, device_name=GPU)
    serving = serving_of(graph_on("cpu"), config=CompileConfig())
    assert serving.linear(SHAPE)
    assert not serving.linear(replace(SHAPE, depth=1))


@pytest.mark.usefixtures("gpu")
def test_what_no_table_has_may_be_measured(monkeypatch):
    measured = []

    def measure(shape, *, device):
        measured.append(shape)
        assert device.type == "cuda"
        return [replace(row, shape=shape) for row in ROWS]

    timing = type("timing", (), {"measure": staticmethod(measure)})
    monkeypatch.setattr(kernel_serving, "import_module", lambda _: timing)
    serving = serving_of(graph_on("cpu"), config=CompileConfig(gemms="measure"))
    other = replace(SHAPE, dtype="float32")
    assert [serving.linear(shape) for shape in (SHAPE, SHAPE, other)] == [True, True, False]
    assert measured == [SHAPE]
    assert table_of(GPU).serves(SHAPE)
