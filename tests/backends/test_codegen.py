"""The generated source: what a person reads, and that it is what runs."""

import pytest
import torch

from nanoflow_compiler.capture import capture_step
from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.hardware import DEVICE_SPECS
from nanoflow_compiler.ir import Program
from nanoflow_compiler.models.hf import PackedDecoder
from nanoflow_compiler.passes.emit import emit
from nanoflow_compiler.pipeline import compile_graph
from nanoflow_compiler.stepper import Stepper
from tiny_models import llama

CONFIG = CompileConfig(parts=2, clusters="eager")


@pytest.fixture(scope="module")
def step_of_one_layer():
    """The packed step of one decoder layer in two parts, planned for a device with lanes."""
    captured = capture_step(PackedDecoder(llama(num_hidden_layers=1), max_length=64))
    with torch.no_grad():
        return compile_graph(
            captured, config=CONFIG, device=DEVICE_SPECS["a100-80gb"], step=Stepper()
        )


def test_program_of_one_layer(step_of_one_layer, golden):
    program = emit(step_of_one_layer.plans[-1])
    golden("llama_layer.program.txt", f"{program}\n")
    assert Program.parse(str(program)) == program


def test_source_of_one_layer(step_of_one_layer, golden):
    golden("llama_layer.source.txt", step_of_one_layer.executables[-1].source)


def test_names_of_a_model_that_the_source_uses_itself():
    def function(cuts, inputs, merge, values):
        picked = torch.take(merge, values)
        return (cuts * 2 + merge).cumsum(0) + picked, inputs + picked

    tensors = [torch.arange(12.0).view(4, 3) * scale for scale in (1, 2, 3)]
    arguments = (*tensors, torch.arange(12).view(4, 3))
    torch._dynamo.reset()
    compiled = torch.compile(
        function, backend="nanoflow", options={"parts": 2, "clusters": "eager"}
    )
    with torch.no_grad():
        assert all(map(torch.equal, compiled(*arguments), function(*arguments)))


def test_an_argument_called_as_the_function_that_packs_weights():
    class Model(torch.nn.Linear):
        def forward(self, pack):
            return super().forward(pack) + pack

    model, x = Model(8, 8), torch.randn(4, 8)
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend="nanoflow", options={"gemms": "packed", "clusters": "eager"}
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
