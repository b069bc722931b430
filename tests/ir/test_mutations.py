"""The checks bite: whatever single thing is broken in a plan, it is refused before it runs.

Programs are broken one instruction at a time, those of random graphs and that of a real decoder.
Each broken one must be refused, by ``verify`` or when the reference backend is built, and with an
error of ours. No mutant may survive: that a wait cannot be spared is shown by brute force.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import fx

from captures import packed_llama
from closures import is_safe, needed, spans_of
from nanoflow_compiler.backends.reference import ReferenceExecutable
from nanoflow_compiler.backends.unit import Unit
from nanoflow_compiler.errors import InvalidProgramError
from nanoflow_compiler.hardware import DEVICE_SPECS
from nanoflow_compiler.ir import Launch, Merge, Program, Schedule, Span, Split, Wait
from nanoflow_compiler.ir.verify import verify
from nanoflow_compiler.passes.emit import emit
from nanoflow_compiler.passes.estimate import estimate
from nanoflow_compiler.passes.nano_split import nano_split
from nanoflow_compiler.passes.schedule import schedule
from strategies import plans

DEVICE = DEVICE_SPECS["h200-sxm"]
Mutants = Iterator[tuple[str, Program]]


def unit_of(plan: Schedule) -> Unit:
    """Operations without a module: enough to build an executable, which is all that is done."""
    return Unit.of(plan.nano.graph, fx.GraphModule(torch.nn.Module(), fx.Graph()))


def is_refused(program: Program, unit: Unit) -> bool:
    """With an error of ours; any other is a failure of the test."""
    try:
        ReferenceExecutable(program, unit)
    except InvalidProgramError:
        return True
    return False


def with_items(program: Program, items: list) -> Program:
    return replace(program, instructions=tuple(items))


def without(program: Program, at: int) -> Program:
    return with_items(program, [*program.instructions[:at], *program.instructions[at + 1 :]])


def put(program: Program, at: int, *items) -> Program:
    return with_items(
        program, [*program.instructions[:at], *items, *program.instructions[at + 1 :]]
    )


def positions(program: Program, kind) -> list[int]:
    return [at for at, item in enumerate(program.instructions) if isinstance(item, kind)]


def dropped(program: Program) -> Mutants:
    """Any instruction: a wait, a record, a launch, a split or a merge."""
    for at, item in enumerate(program.instructions):
        yield f"without {item}", without(program, at)


def duplicated(program: Program) -> Mutants:
    for at in positions(program, Launch):
        item = program.instructions[at]
        yield f"twice {item}", put(program, at, item, item)


def dependent(program: Program) -> Iterator[tuple[int, int]]:
    """Launches of which the second reads what the first wrote."""
    launches = set(positions(program, Launch))
    return (pair for pair in sorted(needed(program), key=str) if launches.issuperset(pair))


def swapped(program: Program) -> Mutants:
    """Two launches that depend on each other, of one lane or of two, are issued the other way."""
    for source, target in dependent(program):
        items = list(program.instructions)
        items[source], items[target] = items[target], items[source]
        yield f"{items[source]} before {items[target]}", with_items(program, items)


def smaller(span: Span, num_cells: int) -> Iterator[Span]:
    """One cell less, at either end."""
    first, last = (0, num_cells) if span.dim is None else (span.first, span.last)
    dim = span.dim or 0
    yield Span(span.value, dim, first, last - 1)
    yield Span(span.value, dim, first + 1, last)


def shrunk(program: Program) -> Mutants:
    """One span of what an instruction reads or writes; or the cells of a launch."""
    for at, item in enumerate(program.instructions):
        for other in shrunk_items(item, program.num_cells):
            yield f"{other} for {item}", put(program, at, other)


def shrunk_items(item, num_cells: int) -> Iterator:
    match item:
        case Launch():
            yield replace(item, first=item.first + 1)
            yield replace(item, last=item.last - 1)
            yield from changed_tuple(item, "reads", num_cells)
            yield from changed_tuple(item, "writes", num_cells)
        case Split():
            for name in ("source", "target"):
                for span in smaller(getattr(item, name), num_cells):
                    yield replace(item, **{name: span})
        case Merge():
            yield from changed_tuple(item, "sources", num_cells)
            for span in smaller(item.target, num_cells):
                yield replace(item, target=span)


def changed_tuple(item, name: str, num_cells: int) -> Iterator:
    spans = getattr(item, name)
    for index, span in enumerate(spans):
        for other in smaller(span, num_cells):
            yield replace(item, **{name: (*spans[:index], other, *spans[index + 1 :])})


def retargeted(program: Program) -> Mutants:
    """One read of a launch is of the next value that the program has."""
    items = program.instructions
    known = dict.fromkeys(program.inputs)
    for item in items:
        known |= dict.fromkeys(span.value for span in spans_of(item)[1])
    after = dict(pairwise([*known, *list(known)[:1]]))
    for at in positions(program, Launch):
        launch = items[at]
        for index, span in enumerate(launch.reads):
            if after[span.value] == span.value:
                continue
            read = replace(span, value=after[span.value])
            reads = (*launch.reads[:index], read, *launch.reads[index + 1 :])
            yield f"{read} read by {launch}", put(program, at, replace(launch, reads=reads))


MUTATIONS = [dropped, duplicated, swapped, shrunk, retargeted]


def real_plan(parts: int, **options) -> Schedule:
    ops = estimate(packed_llama(**options).ops, device=DEVICE)
    plan = schedule(nano_split(ops, parts=parts, device=DEVICE), device=DEVICE, lanes=3)
    assert len({slot.lane for slot in plan.slots}) > 1
    return plan


@pytest.mark.parametrize("mutate", MUTATIONS)
@settings(max_examples=15, deadline=None, phases=set(Phase) - {Phase.explain})
@given(plan=plans(most_ops=7))
def test_no_mutant_of_a_random_program_survives(mutate, plan):
    program, unit = emit(plan), unit_of(plan)
    assert not is_refused(program, unit)
    for what, mutant in mutate(program):
        assert is_refused(mutant, unit), f"{what}\n{program}"


@pytest.mark.parametrize(("parts", "kernels"), [(2, "aten"), (3, "aten"), (2, "own")])
@pytest.mark.parametrize("mutate", MUTATIONS)
def test_no_mutant_of_a_real_program_survives(mutate, parts, kernels):
    """Also where one operation rotates and appends: attention reads what it makes, and its handle."""
    plan = real_plan(parts, kernels=kernels)
    program, unit = emit(plan), unit_of(plan)
    assert not is_refused(program, unit)
    count = 0
    for what, mutant in mutate(program):
        count += 1
        assert is_refused(mutant, unit), what
    assert count > 10


def without_edges(plan: Schedule) -> Iterator:
    for at in range(len(plan.nano.edges)):
        edges = (*plan.nano.edges[:at], *plan.nano.edges[at + 1 :])
        yield plan.nano.edges[at], replace(plan.nano, edges=edges)


@settings(max_examples=15, deadline=None)
@given(plan=plans())
def test_no_edge_can_be_spared(plan):
    for edge, nano in without_edges(plan):
        with pytest.raises(InvalidProgramError, match="no edge ") as caught:
            verify(nano, where="nano_split")
        assert str(edge) in str(caught.value)


def test_no_edge_of_a_real_plan_can_be_spared():
    edges = list(without_edges(real_plan(2)))
    assert len(edges) > 50
    for _, nano in edges:
        with pytest.raises(InvalidProgramError, match="no edge "):
            verify(nano, where="nano_split")


def spared(program: Program) -> list[Wait]:
    """Waits without which all that is needed would still be guaranteed."""
    waits = positions(program, Wait)
    return [program.instructions[at] for at in waits if is_safe(without(program, at))]


@settings(max_examples=25, deadline=None)
@given(plan=plans())
def test_every_wait_is_needed(plan):
    """By brute force, not by the clocks that both emit and verify have."""
    program = emit(plan)
    assert is_safe(program)
    assert spared(program) == []


@pytest.mark.parametrize("parts", [2, 3])
def test_every_wait_of_a_real_program_is_needed(parts):
    program = emit(real_plan(parts))
    assert is_safe(program)
    assert spared(program) == []


@settings(max_examples=40, deadline=None)
@given(plan=plans(), data=st.data())
def test_verify_refuses_exactly_what_is_not_guaranteed(plan, data):
    """Some waits gone, and some that tell a lane what it knows: brute force and clocks agree."""
    program = emit(plan)
    waits = positions(program, Wait)
    picked = st.sets(st.sampled_from(waits)) if waits else st.just(set())
    gone, more = data.draw(picked), data.draw(picked)
    items = []
    for at, item in enumerate(program.instructions):
        items += [item] * ((at not in gone) + (at in more))
    mutant = with_items(program, items)
    assert is_refused(mutant, unit_of(plan)) != is_safe(mutant)


def test_launches_on_other_lanes_are_refused_exactly_if_not_guaranteed():
    """Where two launches trade lanes, the waits around them may still do."""
    plan = real_plan(2)
    program, unit = emit(plan), unit_of(plan)
    verdicts = set()
    for source, target in dependent(program):
        first, second = program.instructions[source], program.instructions[target]
        items = list(program.instructions)
        items[source] = replace(first, lane=second.lane)
        items[target] = replace(second, lane=first.lane)
        mutant = with_items(program, items)
        verdicts.add(is_safe(mutant))
        assert is_refused(mutant, unit) != is_safe(mutant), f"{first} and {second}"
    assert verdicts == {True, False}
