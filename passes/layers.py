"""Repeated layers, found in the sequence of operations by their signatures."""

from collections.abc import Hashable, Sequence

__all__ = ["find_layers"]


def find_layers(signatures: Sequence[Hashable]) -> list[int | None]:
    """For each position the index of its layer, or None outside of the repetition.

    Finds the period whose repetitions cover the most positions (of those, the shortest): a
    layer is one period. The last layer of a model may end in another way, since nothing follows
    it: half of a period more is one more layer. Without at least two equal stretches there are none.
    """
    best = (0, 0, 0, 0)  # positions covered, -period, start, positions of one more layer
    for period in range(1, len(signatures) // 2 + 1):
        if best[0] == len(signatures):
            break
        for start, length in _runs(signatures, period):
            covered = (length // period + 1) * period
            if length >= period:
                found = (covered, -period, start, length % period)
                best = max(best, found, key=lambda found: found[:2])
    covered, minus_period, start, more = best
    end = start + covered + (more if 2 * more >= -minus_period else 0)
    return [
        (at - start) // -minus_period if covered and start <= at < end else None
        for at in range(len(signatures))
    ]


def _runs(signatures: Sequence[Hashable], period: int) -> list[tuple[int, int]]:
    """Stretches in which each signature equals the one a period later: start and length."""
    runs: list[tuple[int, int]] = []
    length = 0
    last = len(signatures) - period
    for at in range(last + 1):
        if at < last and signatures[at] == signatures[at + period]:
            length += 1
        elif length:
            runs.append((at - length, length))
            length = 0
    return runs
