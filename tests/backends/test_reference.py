"""reference: any program of a graph computes what the module does, in every order that is allowed."""

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from captures import packed_llama
from nanoflow_compiler.backends.clusters import Kernels
from nanoflow_compiler.backends.reference import ReferenceExecutable, build
from nanoflow_compiler.backends.unit import Unit
from nanoflow_compiler.errors import InvalidProgramError
from nanoflow_compiler.hardware import DEVICE_SPECS
from nanoflow_compiler.ir import Launch, Program, Record, Wait
from nanoflow_compiler.passes.emit import emit
from nanoflow_compiler.passes.estimate import estimate
from nanoflow_compiler.passes.nano_split import nano_split
from nanoflow_compiler.passes.schedule import schedule
from random_functions import TOKENS, functions
from traces import trace

H200 = DEVICE_SPECS["h200-sxm"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def layer(x, w0, w1, w2, bias, state):
    """A gated block with a join in the middle and a state of its own for each row."""
    normed = functional.layer_norm(x, (4,))
    hidden = functional.silu(normed @ w0.t()) * (normed @ w1.t())
    centered = hidden - hidden.mean(0, keepdim=True)
    new = state.index_copy(1, torch.tensor([1]), centered[:, None])
    out = new.sum(1) @ w2.t() + bias + x
    state.copy_(new)
    return out, centered.cumsum(0), out.t()


INPUTS = {
    "x": random(9, 4),
    "w0": random(6, 4),
    "w1": random(6, 4) * 0.5,
    "w2": random(4, 6),
    "bias": random(4),
    "state": random(9, 3, 6),
}


class Layer:
    """The function above, analysed; programs of it, and what they compute."""

    def __init__(self):
        self.traced = trace(
            layer, INPUTS, tokens={"x": 0, "state": 0}, weights=("w0", "w1", "w2", "bias")
        )
        self.graph = estimate(self.traced.analyse(), device=H200)
        self.unit = Unit.of(self.graph, self.traced.module)

    def program(self, parts, lanes=3) -> Program:
        nano = nano_split(self.graph, parts=parts, device=H200)
        return emit(schedule(nano, device=H200, lanes=lanes))

    def check(self, executable, cuts):
        given_inputs = {name: tensor.clone() for name, tensor in INPUTS.items()}
        expected_inputs = {name: tensor.clone() for name, tensor in INPUTS.items()}
        expected = layer(**expected_inputs)
        actual = executable(self.traced.bind(self.graph, **given_inputs), cuts)
        for made, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(made, wanted)
        torch.testing.assert_close(given_inputs["state"], expected_inputs["state"])


@pytest.fixture(scope="module")
def subject():
    return Layer()


CUTS = {
    1: [(0, 9)],
    2: [(0, 5, 9), (0, 1, 9), (0, 8, 9)],
    3: [(0, 3, 6, 9), (0, 1, 2, 9), (0, 7, 8, 9)],
}


@pytest.mark.parametrize(
    ("parts", "cuts"), [(n, cuts) for n, all_cuts in CUTS.items() for cuts in all_cuts]
)
def test_parts_compute_what_the_module_does(subject, parts, cuts):
    program = subject.program(parts)
    assert program.num_cells == parts
    subject.check(ReferenceExecutable(program, subject.unit), cuts)


def test_operations_in_different_numbers_of_parts(subject):
    parts = {op.name: 1 + at % 3 for at, op in enumerate(subject.graph.ops)}
    program = subject.program(parts)
    assert program.num_cells == 6
    subject.check(ReferenceExecutable(program, subject.unit), (0, 1, 2, 3, 5, 8, 9))


@pytest.mark.parametrize("seed", range(12))
def test_every_interleaving_gives_the_same(subject, seed):
    program = subject.program(3)
    assert {item.lane for item in program.instructions} == {0, 1}
    executable = ReferenceExecutable(program, subject.unit, seed=seed)
    subject.check(executable, (0, 2, 5, 9))
    subject.check(executable, (0, 4, 5, 9))


def without(program, at):
    items = (*program.instructions[:at], *program.instructions[at + 1 :])
    return replace(program, instructions=items)


def waits_for_work(program):
    """Positions of waits between work on two lanes; others are for inputs, or end the program."""
    items = program.instructions
    recorded = {item.event: at for at, item in enumerate(items) if isinstance(item, Record)}
    for at, item in enumerate(items):
        if not isinstance(item, Wait):
            continue
        record = items[recorded[item.event]]
        before = [other for other in items[: recorded[item.event]] if other.lane == record.lane]
        after = [other for other in items[at:] if other.lane == item.lane]
        if any(isinstance(other, Launch) for other in before) and any(
            isinstance(other, Launch) for other in after
        ):
            yield at


def test_a_missing_wait_is_refused(subject):
    program = subject.program(2)
    missing = [at for at, item in enumerate(program.instructions) if isinstance(item, Wait)]
    assert len(missing) > 3
    for at in missing:
        with pytest.raises(InvalidProgramError, match="reference: lane"):
            ReferenceExecutable(without(program, at), subject.unit)


def fails(executable, inputs, cuts):
    try:
        executable(inputs, cuts)
    except InvalidProgramError as error:
        return "is read before it is written" in str(error)
    return False


def test_a_missing_wait_would_show_in_some_order(subject):
    """Without the checks, too, it is an error in the run, and no wrong answer."""
    program = subject.program(2)
    positions = list(waits_for_work(program))
    assert len(positions) > 2
    for at in positions:
        found = False
        for seed in range(80):
            executable = ReferenceExecutable(program, subject.unit, seed=seed)
            executable._program = without(program, at)
            given_inputs = {name: tensor.clone() for name, tensor in INPUTS.items()}
            found = fails(executable, subject.traced.bind(subject.graph, **given_inputs), (0, 4, 9))
            if found:
                break
        assert found, program.instructions[at]


def changed(program, kind, **changes):
    """The first launch of an operation of that kind, changed."""
    items = list(program.instructions)
    at = next(
        at for at, item in enumerate(items) if isinstance(item, Launch) and item.op.startswith(kind)
    )
    items[at] = replace(items[at], **changes)
    return replace(program, instructions=tuple(items))


def test_launches_are_checked_against_their_operations(subject):
    program = subject.program(1, lanes=1)
    (cumsum,) = [op for op in subject.graph.ops if op.label.startswith("cumsum")]
    outputs = tuple(name for name in program.outputs if name not in cumsum.writes)
    at = next(
        at for at, item in enumerate(program.instructions) if getattr(item, "op", "") == cumsum.name
    )
    extra = Launch("no_op", 0, 1, 0, 1, (), ())
    broken = {
        f"{cumsum.name} never run": replace(without(program, at), outputs=outputs),
        "reads other values: launch gemm_0": changed(program, "gemm_0", reads=()),
        "reads other values: launch no_op": replace(
            program, instructions=(*program.instructions, extra)
        ),
        f"writes other values: launch {cumsum.name}": replace(
            changed(program, cumsum.name, writes=()), outputs=outputs
        ),
    }
    for message, mutant in broken.items():
        with pytest.raises(InvalidProgramError, match=f"reference: {message}"):
            ReferenceExecutable(mutant, subject.unit)


def test_a_closed_executable_does_not_run(subject):
    executable = ReferenceExecutable(subject.program(1), subject.unit)
    executable.close()
    with pytest.raises(InvalidProgramError, match="run: this executable is closed"):
        executable([], (0, 9))


def test_its_source_is_the_program(subject, tmp_path):
    program = subject.program(2)
    path = tmp_path / "program_0.py"
    executable = build(
        program, unit=subject.unit, kernels=Kernels(), clusters="inductor", path=path
    )
    assert executable.source == str(program)
    assert (tmp_path / "program_0.txt").read_text() == str(program)
    assert Program.parse(executable.source) == program
    assert executable.num_cells == 2
    subject.check(executable, (0, 6, 9))


def test_attention_is_called_with_the_parts_that_it_is_launched_for():
    found = packed_llama()
    unit = Unit.of(found.ops, found.module)
    graph = estimate(found.ops, device=H200)
    nano = nano_split(graph, parts=3, device=H200)
    program = emit(schedule(nano, device=H200, lanes=3))
    parts = ReferenceExecutable(program, unit).attention_parts
    assert parts[0] == (0, 3)
    assert sorted(parts[1:]) == [(0, 1), (1, 2), (2, 3)]


@settings(max_examples=12, deadline=None, phases=set(Phase) - {Phase.explain})
@given(functions(), st.data())
def test_random_functions_in_random_parts(drawn, data):
    traced = drawn.trace()
    expected_inputs = {name: tensor.clone() for name, tensor in traced.inputs.items()}
    expected = drawn(**expected_inputs)
    graph = estimate(traced.analyse(), device=H200)
    numbers = {op.name: data.draw(st.integers(1, 3)) for op in graph.ops}
    nano = nano_split(graph, parts=numbers, device=H200)
    program = emit(schedule(nano, device=H200, lanes=data.draw(st.integers(1, 4))))
    inner = st.lists(
        st.integers(1, TOKENS - 1),
        min_size=program.num_cells - 1,
        max_size=program.num_cells - 1,
        unique=True,
    )
    cuts = (0, *sorted(data.draw(inner)), TOKENS)
    executable = ReferenceExecutable(
        program, Unit.of(graph, traced.module), seed=data.draw(st.integers(0, 99))
    )
    given_inputs = {name: tensor.clone() for name, tensor in traced.inputs.items()}
    actual = executable(traced.bind(graph, **given_inputs), cuts)
    for made, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(made, wanted, equal_nan=True)
    torch.testing.assert_close(given_inputs["state"], expected_inputs["state"])
