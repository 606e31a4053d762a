"""Conversations of different lengths laid end to end, so that a batch holds hardly any padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heappop, heappush


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of at most `capacity` tokens that hold sequences of the given lengths.

    Best fit, longest first, finds how many rows there are to be; the sequences are then dealt out again so that the
    longest of these rows, to whose length the others are padded, is short.

    Args:
        lengths: tokens of each sequence.
        capacity: most tokens of a row.

    Returns:
        The sequences of each row by number, in ascending order; rows in the order of their first sequences. The same
        lengths always give the same rows.

    Raises:
        ValueError: a sequence is longer than a row, or has no token.
    """
    rows: list[list[int]] = []
    # (room left, row) of the rows that have room, ascending.
    open_rows: list[tuple[int, int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        length = lengths[number]
        if not 0 < length <= capacity:
            raise ValueError(f"sequence {number} has {length} tokens; a row holds 1 to {capacity}")
        place = bisect_left(open_rows, (length, -1))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(number)
        if room > length:
            insort(open_rows, (room - length, row))
    even = _dealt(lengths, len(rows))
    if _longest(lengths, even) < _longest(lengths, rows):
        rows = even
    return sorted(sorted(row) for row in rows)


def _dealt(lengths: Sequence[int], count: int) -> list[list[int]]:
    """`count` rows of about the same length: the next longest sequence goes to the row that has least."""
    rows: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, row) for row in range(count)]
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        load, row = heappop(loads)
        rows[row].append(number)
        heappush(loads, (load + lengths[number], row))
    return rows


def _longest(lengths: Sequence[int], rows: Sequence[Sequence[int]]) -> int:
    return max((sum(lengths[number] for number in row) for row in rows), default=0)
