"""What a program guarantees and what it needs, by brute force: paths in a graph, and no clocks."""

from nanoflow_compiler.ir import Launch, Merge, Program, Record, Span, Split, Wait
from nanoflow_compiler.ir.replay import is_order

START, END = "start", "end"
Node = int | str


def guaranteed(program: Program) -> dict[Node, set[Node]]:
    """For each instruction those that are certain to have ended before it: all that lead to it."""
    last: dict[int, Node] = {0: START}
    recorded: dict[int, Node] = {}
    before: dict[Node, set[Node]] = {START: set()}

    def follow(node: Node, *sources: Node) -> None:
        before[node] = set(sources).union(*(before[source] for source in sources))

    for at, item in enumerate(program.instructions):
        sources = [last[item.lane]] if item.lane in last else []
        if isinstance(item, Wait):
            sources.append(recorded[item.event])
        elif isinstance(item, Record):
            recorded[item.event] = at
        follow(at, *sources)
        last[item.lane] = at
    follow(END, last[0])
    return before


def needed(program: Program) -> set[tuple[Node, Node]]:
    """Pairs of instructions of which the second reads what the first wrote; all come before the end."""
    written = {Span(name): START for name in program.inputs}
    pairs: set[tuple[Node, Node]] = set()
    for at, item in enumerate(program.instructions):
        reads, writes = spans_of(item)
        for span in reads:
            pairs |= {(source, at) for source in _writers(span, written, program.num_cells)}
        written |= dict.fromkeys(writes, at)
        if not isinstance(item, Record | Wait):
            pairs.add((at, END))
    return pairs


def spans_of(item: object) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """What an instruction reads, and what it writes."""
    match item:
        case Launch():
            return item.reads, item.writes
        case Split():
            return (item.source,), (item.target,)
        case Merge():
            return item.sources, (item.target,)
    return (), ()


def _writers(span: Span, written: dict[Span, Node], num_cells: int) -> set[Node]:
    if not is_order(span.value):
        return {written[span]}
    first, last = _cells(span, num_cells)
    found: set[Node] = set()
    for other, source in written.items():
        begin, end = _cells(other, num_cells)
        if other.value == span.value and begin < last and end > first:
            found.add(source)
    return found


def _cells(span: Span, num_cells: int) -> tuple[int, int]:
    return (0, num_cells) if span.dim is None else (span.first, span.last)


def is_safe(program: Program) -> bool:
    """Whether all that is needed is guaranteed."""
    before = guaranteed(program)
    return all(source in before[target] for source, target in needed(program))
