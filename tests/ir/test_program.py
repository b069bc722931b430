"""Program: it prints and parses back, and each rule of ``verify``."""

import pytest
from hypothesis import given, settings

from nanoflow_compiler.errors import InvalidProgramError
from nanoflow_compiler.ir import Launch, Merge, Program, Record, Span, Split, Wait
from nanoflow_compiler.ir.verify import verify
from strategies import programs

GOOD = """
program cells=2 lanes=2
inputs (x, w)
  split lane=0 (x) -> (x@0[0:1])
  record lane=0 event=0
  launch gemm[0:1] lane=0 sms=64 (x@0[0:1], w) -> (h@1[0:1], !kv@0[0:1])
  wait lane=1 event=0
  split lane=1 (x) -> (x@0[1:2])
  launch gemm[1:2] lane=1 sms=68 (x@0[1:2], w) -> (h@1[1:2], !kv@0[1:2])
  record lane=1 event=1
  launch attend[0:1] lane=0 sms=132 (h@1[0:1], !kv@0[0:1]) -> (a@0[0:1])
  wait lane=0 event=1
  launch attend[1:2] lane=0 sms=132 (h@1[1:2], !kv) -> (a@0[1:2])
  merge lane=0 dim=0 (a@0[0:1], a@0[1:2]) -> (a)
outputs (a)
""".strip()


def test_each_instruction_parses():
    program = Program.parse(GOOD)
    assert (program.inputs, program.outputs) == (("x", "w"), ("a",))
    assert (program.num_cells, program.num_lanes) == (2, 2)
    x, part = Span("x"), Span("x", 0, 0, 1)
    assert program.instructions[0] == Split(x, part, 0)
    assert program.instructions[1] == Record(0, 0)
    assert program.instructions[2] == Launch(
        "gemm", 0, 1, 0, 64, (part, Span("w")), (Span("h", 1, 0, 1), Span("!kv", 0, 0, 1))
    )
    assert program.instructions[3] == Wait(0, 1)
    halves = Span("a", 0, 0, 1), Span("a", 0, 1, 2)
    assert program.instructions[-1] == Merge(halves, Span("a"), 0, 0)


@settings(max_examples=50, deadline=None)
@given(programs())
def test_it_prints_and_parses_back(program):
    verify(program, where="emit")
    again = Program.parse(str(program))
    assert again == program
    assert hash(again) == hash(program)
    assert str(again) == str(program)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("program cells=2 lanes=2", "program cells=2", "cannot read line 'program cells=2'"),
        ("inputs (x, w)", "inputs x, w", "cannot read line 'inputs x, w'"),
        ("outputs (a)", "outputs", "cannot read line 'outputs'"),
        ("record lane=0 event=0", "halt lane=0", "unknown instruction 'halt'"),
        ("record lane=0 event=0", "record lane=0", "cannot read line 'record lane=0'"),
        ("wait lane=1 event=0", "wait lane=1 event=", "cannot read line 'wait lane=1 event='"),
        ("split lane=0 (x)", "split (x)", "cannot read line 'split (x) -> (x@0[0:1])'"),
        ("merge lane=0 dim=0", "merge lane=0", "cannot read line 'merge lane=0 (a"),
        ("sms=64", "sms=many", "cannot read line 'launch gemm[0:1] lane=0 sms=many"),
        ("(x@0[0:1], w)", "(x@0[0:], w)", "cannot read line 'x@0[0:]'"),
    ],
)
def test_what_it_cannot_read_is_named(old, new, message):
    assert old in GOOD
    with pytest.raises(InvalidProgramError) as caught:
        Program.parse(GOOD.replace(old, new, 1))
    assert str(caught.value).startswith(f"parse: {message}")
    assert caught.value.where == "parse"


def test_a_program_has_three_lines():
    with pytest.raises(InvalidProgramError, match="parse: a program has a head"):
        Program.parse("program cells=1 lanes=1\noutputs ()")


def program(*lines, outputs=""):
    """Two cells, two lanes, one input."""
    body = [f"  {line}" for line in lines]
    return "\n".join(["program cells=2 lanes=2", "inputs (x)", *body, f"outputs ({outputs})"])


FIRST = "launch f[0:1] lane=0 sms=1 (x@0[0:1]) -> (h@0[0:1], !kv@0[0:1])"
SECOND = "launch f[1:2] lane=0 sms=1 (x@0[1:2]) -> (h@0[1:2], !kv@0[1:2])"
HALVES = ("split lane=0 (x) -> (x@0[0:1])", "split lane=0 (x) -> (x@0[1:2])")
WHOLE = "launch g[0:2] lane=0 sms=1 (x) -> (y)"

BROKEN = {
    "no lane 2 for: record lane=2 event=0": program("record lane=2 event=0"),
    "event 0 is recorded twice": program("record lane=0 event=0", "record lane=1 event=0"),
    "lane 1 waits for event 0 before it is recorded": program(
        "wait lane=1 event=0", "record lane=0 event=0"
    ),
    "h is not written before: launch": program("launch g[0:2] lane=0 sms=1 (h) -> ()"),
    "x@0[0:1] is not written before: launch": program(FIRST),
    "x@1[0:1] is not written before: launch": program(
        HALVES[0], "launch f[0:1] lane=0 sms=1 (x@1[0:1]) -> ()"
    ),
    "y is not written before: the end": program(outputs="y"),
    "lane 1 does not wait for x from lane 0": program("launch g[0:2] lane=1 sms=1 (x) -> ()"),
    "lane 1 does not wait for y from lane 0": program(
        "record lane=0 event=0",
        WHOLE,
        "wait lane=1 event=0",
        "launch k[0:2] lane=1 sms=1 (y) -> ()",
    ),
    "lane 0 does not wait for y from lane 1: the end": program(
        "record lane=0 event=0",
        "wait lane=1 event=0",
        "launch g[0:2] lane=1 sms=1 (x) -> (y)",
        outputs="y",
    ),
    "lane 0 ends before lanes [1]": program("launch g[0:2] lane=1 sms=1 () -> ()"),
    "!kv is not complete before: launch": program(
        *HALVES, FIRST, "launch g[0:2] lane=0 sms=1 (!kv) -> ()", SECOND
    ),
    "!kv@0[0:1] is not complete before: launch": program(
        *HALVES, SECOND, "launch k[0:1] lane=0 sms=1 (!kv@0[0:1]) -> ()"
    ),
    "lane 1 does not wait for !kv from lane 0": program(
        *HALVES, FIRST, SECOND, "launch g[0:2] lane=1 sms=1 (!kv) -> ()"
    ),
    "x@0[1:2] is not the part [0:1] of f": program(
        *HALVES, "launch f[0:1] lane=0 sms=1 (x@0[1:2]) -> ()"
    ),
    "h@0[1:2] is not the part [0:1] of f": program("launch f[0:1] lane=0 sms=1 () -> (h@0[1:2])"),
    "x@0[0:1] is not the part [0:2] of g": program(
        HALVES[0], "launch g[0:2] lane=0 sms=1 (x@0[0:1]) -> ()"
    ),
    "!kv@0[1:2] is not the part [1:2] of f": program(
        *HALVES, FIRST, SECOND, "launch f[1:2] lane=0 sms=1 (!kv@0[1:2]) -> ()"
    ),
    "y is written twice": program(WHOLE, WHOLE),
    "x is written twice": program("launch g[0:2] lane=0 sms=1 () -> (x)"),
    "cannot take w@0[0:1] from x": program("split lane=0 (x) -> (w@0[0:1])"),
    "cannot take x@0[1:1] from x": program("split lane=0 (x) -> (x@0[1:1])"),
    "cannot take x@0[0:3] from x": program("split lane=0 (x) -> (x@0[0:3])"),
    "cannot take x from x": program("split lane=0 (x) -> (x)"),
    "cannot take x@0[1:2] from x@0[0:1]": program(
        HALVES[0], "split lane=0 (x@0[0:1]) -> (x@0[1:2])"
    ),
    "cannot take x@1[0:1] from x@0[0:1]": program(
        HALVES[0], "split lane=0 (x@0[0:1]) -> (x@1[0:1])"
    ),
    "does not join: merge lane=0 dim=0 (x@0[0:1]) -> (y)": program(
        HALVES[0], "merge lane=0 dim=0 (x@0[0:1]) -> (y)"
    ),
    "does not join: merge lane=0 dim=0 (h@0[0:1]) -> (h)": program(
        HALVES[0], FIRST, "merge lane=0 dim=0 (h@0[0:1]) -> (h)"
    ),
    "does not join: merge lane=0 dim=0 (h@0[1:2], h@0[0:1]) -> (h)": program(
        *HALVES, FIRST, SECOND, "merge lane=0 dim=0 (h@0[1:2], h@0[0:1]) -> (h)"
    ),
    "does not join: merge lane=0 dim=1 (h@0[0:1], h@0[1:2]) -> (h)": program(
        *HALVES, FIRST, SECOND, "merge lane=0 dim=1 (h@0[0:1], h@0[1:2]) -> (h)"
    ),
    "does not join: merge lane=0 dim=0 (h@0[0:1], h@0[1:2]) -> (h@1[0:2])": program(
        *HALVES, FIRST, SECOND, "merge lane=0 dim=0 (h@0[0:1], h@0[1:2]) -> (h@1[0:2])"
    ),
    "the parts of f, [(0, 1)], do not tile 0..2": program(HALVES[0], FIRST),
    "the parts of g, [(0, 2), (0, 2)], do not tile 0..2": program(
        *["launch g[0:2] lane=0 sms=1 (x) -> ()"] * 2
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_program_is_refused(message):
    verify(Program.parse(GOOD), where="emit")
    with pytest.raises(InvalidProgramError) as caught:
        verify(Program.parse(BROKEN[message]), where="emit")
    assert str(caught.value).startswith(f"emit: {message}")
    assert caught.value.where == "emit"


def test_events_that_say_enough_at_one_remove():
    """Lane 0 hears of lane 1 from lane 2 alone."""
    text = """
        program cells=1 lanes=3
        inputs (x)
        record lane=0 event=0
        wait lane=1 event=0
        launch f[0:1] lane=1 sms=1 (x) -> (h)
        record lane=1 event=1
        wait lane=2 event=1
        launch g[0:1] lane=2 sms=1 (x, h) -> (y)
        record lane=2 event=2
        wait lane=0 event=2
        launch k[0:1] lane=0 sms=1 (h, y) -> (z)
        outputs (z)
    """
    verify(Program.parse(text), where="emit")
