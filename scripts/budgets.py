"""Prints how long functions and files are; fails only for a file above the maximum."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 400
EXCEPTIONS: dict[str, str] = {}
"""File above the maximum -> the reason why splitting it would make it harder to read."""
CODE = ("nanoflow_compiler", "passes", "backends", "models", "scripts")


def function_lengths(path: Path) -> Iterator[int]:
    """Lines of every function of one file, decorators left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1


def summary(lengths: list[int]) -> str:
    """Median, 95th percentile and maximum."""
    ranked = sorted(lengths) or [0]
    last = len(ranked) - 1
    return f"median {ranked[last // 2]}, p95 {ranked[round(last * 0.95)]}, max {ranked[-1]}"


def main() -> int:
    """Print both distributions; return 1 if a file is too long without a listed reason."""
    root = Path(__file__).resolve().parent.parent
    # Path.rglob does not follow the links in nanoflow_compiler/, so each file counts once.
    paths = sorted(path for folder in CODE for path in (root / folder).rglob("*.py"))
    lines = {path.relative_to(root): len(path.read_text().splitlines()) for path in paths}
    functions = [length for path in paths for length in function_lengths(path)]
    print(f"{len(functions)} functions, lines: {summary(functions)}")
    print(f"{len(lines)} files, lines: {summary(list(lines.values()))}")
    too_long = {path: count for path, count in lines.items() if count > MAX_FILE_LINES}
    for path, count in too_long.items():
        reason = EXCEPTIONS.get(str(path), f"FAIL: above {MAX_FILE_LINES}; split it")
        print(f"{path}: {count} lines: {reason}")
    return int(any(str(path) not in EXCEPTIONS for path in too_long))


if __name__ == "__main__":
    sys.exit(main())
