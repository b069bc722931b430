"""Every TOKEN rule is sound: a node runs on any range of its rows and computes those of the whole."""

import operator

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import row_compute_cases  # noqa: F401 - fills CASES
import row_shape_cases  # noqa: F401
from nanoflow_compiler import fused_ops, ops
from nanoflow_compiler.passes.axis import axis
from nanoflow_compiler.passes.axis_compute_rules import is_pointwise, rule_of
from nanoflow_compiler.passes.axis_rules import RULES
from nanoflow_compiler.rows import Status
from row_draw import CASES, Draw
from rows_of_nodes import Case, Operand, check_rows, run_nodes, trace

aten = torch.ops.aten


def pointwise_packets():
    """By ATen's list of schemas. ``equal`` makes a number; ``max`` and ``min`` reduce, too."""
    schemas = torch._C._jit_get_all_schemas()
    names = {item.name.partition("::")[2] for item in schemas if item.name.startswith("aten::")}
    found = {getattr(aten, name) for name in names if hasattr(aten, name)}
    return {packet for packet in found if is_pointwise(packet)} - {aten.equal}


POINTWISE = pointwise_packets()


def name_of(packet):
    return str(packet).removeprefix("aten.")


EXAMPLES = 10
PHASES = set(Phase) - {Phase.explain}


@pytest.mark.parametrize("packet", CASES, ids=name_of)
@settings(max_examples=EXAMPLES, deadline=None, phases=PHASES)
@given(data=st.data())
def test_rows_are_those_of_the_whole(packet, data):
    check(CASES[packet](Draw(data.draw), packet), symbolic=False)


@pytest.mark.parametrize("packet", CASES, ids=name_of)
@settings(max_examples=2, deadline=None, phases=PHASES)
@given(data=st.data())
def test_with_a_symbol_for_the_tokens(packet, data):
    """As captured graphs have it: then no other size equals the tokens by chance."""
    check(CASES[packet](Draw(data.draw), packet), symbolic=True)


def check(call, *, symbolic):
    traced = trace(call, symbolic=symbolic)
    before = run_nodes(traced.module, traced.inputs)
    axis(traced.module, seeds=traced.seeds)
    mark = traced.node.meta["axis"]
    if call.mixes:
        assert mark.status is Status.JOIN, mark
        assert mark.reason.startswith(call.target.overloadpacket.__name__ + ": ")
        return
    assert mark.status is Status.TOKEN, mark
    after = run_nodes(traced.module, traced.inputs)
    torch.testing.assert_close(after[traced.node.name], before[traced.node.name], equal_nan=True)
    assert check_rows(traced.module, after, tokens=call.tokens) > 0


# Kernels of a GPU: what they read and make is placed as by those that run here.
ON_GPU = [
    getattr(aten, f"_scaled_dot_product_{name}")
    for name in (
        "flash_attention",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",
    )
]

# Each of these takes tensors of one kind only; a node may fail on the others as it pleases.
DTYPES = (torch.float64, torch.int64, torch.bool)


def pointwise_calls(packet):
    """A call of each overload that makes one tensor from tensors and numbers."""
    for name in packet.overloads():
        overload = getattr(packet, name)
        schema = overload._schema
        makes_one = [str(item.type) for item in schema.returns] == ["Tensor"]
        takes_tensor = any("Tensor" in str(arg.type) for arg in schema.arguments)
        if makes_one and takes_tensor and not schema.is_mutable and pointwise_overload(overload):
            yield overload, schema


def pointwise_overload(overload):
    """The reductions of max and min have a rule of their own."""
    return overload.overloadpacket not in (aten.max, aten.min) or overload._overloadname == "other"


def pointwise_call(overload, schema, d, dtype):
    x = d.tensor()
    given = [x]
    args, kwargs = [], {}
    for arg in schema.arguments:
        kind = str(arg.type).removeprefix("Optional[").removesuffix("]")
        if kind == "Tensor" and arg.name == "value":
            item = Operand(torch.ones([], dtype=dtype))  # masked_fill takes no other
        elif kind == "Tensor":
            source = given.pop() if given else d.beside(x)
            value = as_dtype(source.value, dtype, arg.name)
            item = Operand(value, source.dim, source.multiple, source.is_seed)
        elif arg.has_default_value() and arg.default_value is not None:
            continue
        else:
            number = 0.5 if dtype is torch.float64 else 2
            item = {"int": 1, "float": 0.5, "bool": False, "str": "floor"}.get(kind, number)
        if arg.kwarg_only:
            kwargs[arg.name] = item
        else:
            args.append(item)
    return Case(overload, tuple(args), kwargs, d.tokens)


def as_dtype(value, dtype, name):
    if name in ("mask", "condition"):
        return value > 0
    return value if dtype is torch.float64 else (value * 3).to(dtype)


def runs(call):
    try:
        trace(call)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True


@pytest.mark.parametrize("packet", sorted(POINTWISE - {aten.frexp}, key=str), ids=name_of)
@settings(max_examples=2, deadline=None, phases=PHASES)
@given(data=st.data())
def test_pointwise_operations_keep_rows(packet, data):
    d = Draw(data.draw)
    for overload, schema in pointwise_calls(packet):
        calls = (pointwise_call(overload, schema, d, dtype) for dtype in DTYPES)
        check(next(call for call in calls if runs(call)), symbolic=False)


def test_operations_that_make_several_tensors_are_refused_by_the_pointwise_rule():
    """Whether by a tuple or by a list of a length that only the data tell."""
    for target in (aten.frexp.Tensor, aten.where.default):
        call = Case(target, (Operand(torch.ones(3, 2), 0),), tokens=3)
        traced = trace(call)
        axis(traced.module, seeds=traced.seeds)
        assert traced.node.meta["axis"].reason.endswith("makes several tensors")


def test_random_operations_have_no_rule():
    for name in ("bernoulli", "dropout", "native_dropout", "rrelu", "normal", "rand_like"):
        assert rule_of(getattr(aten, name)) is None


@pytest.mark.parametrize("packet", ON_GPU, ids=name_of)
def test_attention_of_a_gpu_is_placed_along_the_batch(packet):
    operands = [Operand(torch.zeros(6, 2, 8, 4), 0) for _ in range(3)]
    takes_mask = packet is not aten._scaled_dot_product_flash_attention
    mask = Operand(torch.zeros(6, 2, 8, 8), 0)
    logsumexp = (True,) if str(packet).count("efficient") + str(packet).count("cudnn") else ()
    args = (*operands, *((mask, *logsumexp) if takes_mask else ()))
    traced = trace(Case(packet.default, args, tokens=6), symbolic=True)
    axis(traced.module, seeds=traced.seeds)
    mark = traced.node.meta["axis"]
    assert mark.status is Status.TOKEN, mark
    assert [str(rows) for rows in mark.rows[:2]] == ["dim 0", "dim 0"]
    assert {str(rows) for rows in mark.rows[2:]} == {"None"}
    assert {str(rows) for rows in mark.reads.values()} == {"dim 0"}
    random = dict(traced.node.kwargs) | {"dropout_p": 0.1}
    traced.node.kwargs = random
    axis(traced.module, seeds=traced.seeds)
    assert traced.node.meta["axis"].reason.endswith("draws random numbers")


def packed_calls():
    """Our own operations on packed tokens: the call, and which of its operands have tokens."""
    packed = torch.zeros(6, 2, 4)
    rows = [Operand(packed, 0) for _ in range(3)]
    limits = (0.5, 0, 0, 0.0, None, True, 0)
    hidden, index, scores = (Operand(torch.zeros(6, n), 0) for n in (4, 2, 2))
    experts = (Operand(torch.zeros(3, 8, 4)), Operand(torch.zeros(3, 4, 4)))
    weight = Operand(torch.zeros(4, 10))
    return {
        ops.attention: (*rows, 3, *limits),
        ops.kv_append: (*rows[:2], 3, 0),
        ops.paged_attention: (rows[0], Operand(torch.empty(0)), 3, 4, *limits),
        ops.moe_experts: (hidden, index, scores, *experts, None, None, "silu", True, False),
        fused_ops.linear: (hidden, weight, None),
        fused_ops.linear_add: (Operand(torch.zeros(6, 10), 0), hidden, weight),
        fused_ops.gated_linear: (hidden, weight, "silu"),
        fused_ops.rms_norm: (hidden, Operand(torch.zeros(4)), 1e-6, False),
        fused_ops.rotary_append: (*rows, index, scores, 3, 0),
    }


OURS = {target.overloadpacket: target for target in packed_calls()}


@pytest.mark.parametrize("packet", OURS, ids=name_of)
def test_packed_operations_are_placed_along_the_tokens(packet):
    """That they compute the same in parts is for tests/test_ops.py to say."""
    target = OURS[packet]
    traced = trace(Case(target, packed_calls()[target], tokens=6), symbolic=True)
    axis(traced.module, seeds=traced.seeds)
    mark = traced.node.meta["axis"]
    assert mark.status is Status.TOKEN, mark
    marks = mark.rows if isinstance(mark.rows, tuple) else (mark.rows,)
    handles = {"kv_append": ["None"], "rotary_append": ["dim 0", "None"]}
    assert list(map(str, marks)) == handles.get(packet.__name__, ["dim 0"])
    seeded = {name for name, _ in traced.seeds}
    assert {name for name, rows in mark.reads.items() if rows is not None} == seeded


def test_every_rule_is_tested():
    ours = set(OURS)
    links = {packet for packet in RULES if "_c10d_functional" in str(packet)}
    here = POINTWISE | set(CASES) | set(ON_GPU)
    assert set(RULES) - ours - links - {operator.getitem} <= here
